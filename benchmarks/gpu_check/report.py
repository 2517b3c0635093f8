"""results.json, report.md and report.png of a run; a run of the other half in the same folder is kept beside it."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.results import PartResult, Row, from_json, to_json
from benchmarks.gpu_check.setting import CPU, REHEARSED

RESULTS, REPORT, FIGURE = "results.json", "report.md", "report.png"
COLORS = {CPU: "#999999", REHEARSED: "#E69F00"}  # a card's rows are blue
WHAT_IT_IS = {
    CPU: "computed on the CPU at a shape of toys: values are checked, speed and memory say nothing about a card",
    REHEARSED: "on tensors without values: devices, dtypes, bytes and kernel counts are real, seconds are a model's",
}


def write_report(results: list[PartResult], device: dict[str, Any], command: str, out: Path) -> str:
    """Write all files and return the table that is printed: one row a part, then what missed a limit."""
    everything = sorted([*earlier_parts(results, device, out), *results], key=lambda part: part.group)
    content = json.dumps(to_json(everything, device, command), indent=1)
    (out / RESULTS).write_text(content + "\n", encoding="utf-8")
    summary = summary_table(everything)
    sections = [f"# gpu_check: {device['card'] or 'no card'}", f"`{command}`", versions(device), summary]
    sections += [rows_table(part) for part in everything if part.rows]
    has_figure = draw(everything, out / FIGURE)
    if has_figure:
        sections.insert(4, f"![Values as fractions of their limits]({FIGURE})")
    (out / REPORT).write_text("\n\n".join(sections) + "\n", encoding="utf-8")
    missed = [row for part in everything for row in part.rows if not row.passed]
    files = ", ".join(str(out / name) for name in (RESULTS, REPORT, *([FIGURE] if has_figure else [])))
    return "\n".join(
        ["", summary, *(["", "Outside their limits:", *map(row_line, missed)] if missed else []), "", files]
    )


def earlier_parts(results: list[PartResult], device: dict[str, Any], out: Path) -> list[PartResult]:
    """Return the parts of an earlier run in this folder, on the same device and software, that this one did not run."""
    try:
        content = json.loads((out / RESULTS).read_text(encoding="utf-8"))
        if content["device"] != device:
            return []
        return [part for part in from_json(content) if part.name not in {result.name for result in results}]
    except (OSError, ValueError, KeyError, TypeError):
        return []


def versions(device: dict[str, Any]) -> str:
    return ", ".join(f"{name} {value}" for name, value in device.items() if value and name != "card")


def summary_table(parts: list[PartResult]) -> str:
    lines = ["| part | result | seconds | nearest to its limit | ran on |", "|---|---|---:|---|---|"]
    for part in parts:
        limited = [row for row in part.rows if row.limit is not None]
        nearest = max(limited, key=fraction_of_limit, default=None)
        text = f"{nearest.name}: {nearest.value:.3g} ({nearest.limit})" if nearest else part.message
        lines.append(f"| {part.name} | {part.status} | {part.seconds:.0f} | {cell(text)} | {part.where} |")
    return "\n".join(lines)


def rows_table(part: PartResult) -> str:
    lines = [f"## {part.name}", "", *([f"{part.status}: {cell(part.message)}", ""] if part.message else [])]
    places = dict.fromkeys(row.where for row in part.rows)
    lines += [f"{where}: {WHAT_IT_IS[where]}." for where in places if where in WHAT_IT_IS]
    lines += ["", "| value | | unit | limit | reason or note | ran on |", "|---|---:|---|---|---|---|"]
    for row in part.rows:
        why = "; ".join(filter(None, [row.limit.reason if row.limit else "", row.note]))
        limit = f"{row.limit}{'' if row.passed else ' **missed**'}" if row.limit else ""
        lines.append(f"| {cell(row.name)} | {row.value:.4g} | {row.unit} | {limit} | {cell(why)} | {row.where} |")
    return "\n".join(lines)


def row_line(row: Row) -> str:
    limit = f"limit {row.limit}: {row.limit.reason}" if row.limit else "recorded"
    return f"  {row.name}: {row.value:.4g} {row.unit} [{row.where}], {limit}"


def cell(text: str) -> str:
    return text.replace("|", "/").replace("\n", " ")


def fraction_of_limit(row: Row) -> float:
    """Return how much of its limit a value takes: 1 is at the limit, more is a failure."""
    assert row.limit is not None
    if not row.passed and not abs(row.value) < float("inf"):
        return float("inf")
    if row.limit.at == "least":
        return row.limit.bound / row.value if row.value > 0 else float("inf")
    return row.value / row.limit.bound if row.limit.bound else float(row.value > 0) * float("inf") if row.value else 0.0


def draw(parts: list[PartResult], path: Path) -> bool:
    """Draw every value with a limit as a fraction of it, part by part; return False where matplotlib is missing."""
    try:
        from matplotlib.figure import Figure
        from matplotlib.lines import Line2D
    except ImportError:
        return False
    shown = [part for part in parts if any(row.limit for row in part.rows)]
    fig = Figure(figsize=(8, 1.2 + 0.36 * max(1, len(shown))), layout="constrained")
    ax = fig.subplots()
    places: dict[str, str] = {}
    for height, part in enumerate(reversed(shown)):
        for row in part.rows:
            if row.limit is not None:
                fraction = min(max(fraction_of_limit(row), 1e-3), 30.0)
                color = places.setdefault(row.where, COLORS.get(row.where, "#0072B2"))
                ax.plot(fraction, height, "o" if row.passed else "X", color=color, markersize=5 if row.passed else 9)
    ax.axvline(1, color="#D55E00", linewidth=1)
    ax.set(xscale="log", xlim=(8e-4, 40), xlabel="fraction of the limit (right of the line: missed)")
    ax.set_yticks(range(len(shown)), [part.name for part in reversed(shown)])
    ax.legend(handles=[Line2D([], [], marker="o", linestyle="", color=c, label=w) for w, c in places.items()])
    ax.spines[["top", "right"]].set_visible(False)
    fig.savefig(path, dpi=130)
    return True
