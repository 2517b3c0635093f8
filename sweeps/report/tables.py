"""The tables of a sweep as people read them: on the terminal, as Markdown, CSV and LaTeX."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from pathlib import Path
from typing import Any

import pandas as pd
from rich.console import Console
from rich.table import Table

from sweeps.analysis.selection import GROUP
from sweeps.report.plot_style import NAMES

LEVEL = 0.05  # two methods are tied unless Holm's p of their difference is below
NARROW = ("KL / sequence", "Shortlist", "To top")  # columns that a narrow terminal goes without, in this order
CAPTION = """chosen on one half of the prompts, measured on the other (95 % interval)
shortlist: points that cannot be told from the best one
tied: cannot be told from the top method (paired t-test, Holm, 5 %)"""


def best_table(best: pd.DataFrame, differences: pd.DataFrame) -> pd.DataFrame:
    """The chosen point of every method as people read it. differences: of held_out.differences."""
    several = {key: best[key].nunique() > 1 for key in ("setup", "init", "variant", "seeds")}
    rows = []
    for row, tie in zip(best.to_dict("records"), against_highest(best, differences), strict=True):
        shown = {key.capitalize(): str(row[key]) for key, more in several.items() if more}
        rows.append(
            shown
            | {
                "Method": NAMES[row["method"]],
                "Kind": row["kind"],
                "beta": f"{row['beta']:g}",
                "lr": f"{row['lr']:g}",
                quality_name(best): with_interval(row),
                "To top": tie,
                "Top 3": with_error(row["top_reporting"], None, 3),
                "Shortlist": str(row["shortlist"]),
                "KL / sequence": with_error(row["kl_sequence"], row["kl_sequence_se"], 2),
                "KL / token": with_error(row["kl_token"], row["kl_token_se"], 3),
                "Reward accuracy": with_error(row["reward_accuracy"], None, 3),
                "Length": with_error(row["response_tokens"], None, 1),
            }
        )
    return pd.DataFrame(rows)


def benchmark_table(best: pd.DataFrame, scores: dict[str, dict[str, dict[str, float]]]) -> pd.DataFrame:
    """What benchmarks say of the chosen points by their own rules, all questions, means over seeds; empty when no point
    has any. scores: of Results."""
    rows = []
    for row in best.to_dict("records"):
        own = [scores.get(identity, {}) for identity in row["identities"]]
        shown = {key.capitalize(): str(row[key]) for key in GROUP if best[key].nunique() > 1}
        shown |= {"Method": NAMES[row["method"]], "beta": f"{row['beta']:g}", "lr": f"{row['lr']:g}"}
        found = {name: pd.DataFrame([s[name] for s in own if name in s]).mean() for s in own for name in s}
        if found:
            rows.append(shown | {_score_name(name): _score(value) for name, value in found.items()})
    return pd.DataFrame(rows).fillna("-")


def _score_name(name: str) -> str:
    return name.replace("_", " ").capitalize() + " %"


def _score(score: pd.Series[float]) -> str:
    if "se" in score:
        return with_error(score["value"], score["se"], 1)
    value = score["value"]
    return f"{value:.1f} ({score['low'] - value:+.1f}, {score['high'] - value:+.1f})"


def against_highest(best: pd.DataFrame, differences: pd.DataFrame) -> list[str]:
    """Of each chosen point: `top`, the highest of its setup, init and variant; `tied` with that; or how far below."""
    highest = best.groupby(GROUP, sort=False, dropna=False).quality_reporting.transform("max")
    tops = {_group(row): row["method"] for row in best[best.quality_reporting == highest].to_dict("records")}
    tests = {(*_group(row), frozenset((row["method"], row["other"]))): row for row in differences.to_dict("records")}
    found = []
    for row in best.to_dict("records"):
        top = tops.get(_group(row))
        test = tests.get((*_group(row), frozenset((row["method"], top))))
        apart = test is not None and test["p_holm"] < LEVEL
        below = f"-{abs(test['difference']):.3f}" if test is not None and apart else "tied"
        found.append("top" if row["method"] == top else below)
    return found


def _group(row: dict[Hashable, Any]) -> tuple[Any, ...]:
    return tuple(row[name] for name in GROUP)


def quality_name(best: pd.DataFrame) -> str:
    names = best.metric.unique()
    return names[0].replace("_", " ").capitalize() if len(names) == 1 else "Quality"


def with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None or pd.isna(value):
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None or pd.isna(error) else f" ± {error:.{digits}f}")


def with_interval(row: dict[Hashable, Any]) -> str:
    low, high = row["quality_reporting_low"], row["quality_reporting_high"]
    return f"{row['quality_reporting']:.3f} [{low:.3f}, {high:.3f}]"


def group_lines(groups: pd.DataFrame) -> list[str]:
    """What the permutation test found, a sentence a setup, init and variant."""
    lines = []
    for row in groups.to_dict("records"):
        where = ", ".join(str(row[k]) for k in GROUP if len(groups) > 1 and row[k])
        lines.append(
            f"{where + ': ' if where else ''}{row['pairwise']} pairwise methods against {row['pointwise']} pointwise: "
            f"{row['difference']:+.3f}, p = {row['p']:.3f} ({row['splits']} splits, one-sided)"
        )
    return lines


def write_tables(folder: Path, tables: dict[str, pd.DataFrame]) -> None:
    """tables/NAME.csv, .md and .tex (booktabs); what is a number has every digit in the first, four in the others."""
    target = folder / "tables"
    target.mkdir(exist_ok=True)
    for name, table in tables.items():
        table.to_csv(target / f"{name}.csv", index=False)
        shown = readable(table)
        lines = ["| " + " | ".join(shown.columns) + " |", "|" + "---|" * len(shown.columns)]
        lines += ["| " + " | ".join(cell.replace("|", r"\|") for cell in row) + " |" for row in shown.to_numpy()]
        (target / f"{name}.md").write_text("\n".join(lines) + "\n")
        tex = shown.to_latex(index=False, escape=True, column_format="l" * len(shown.columns))
        (target / f"{name}.tex").write_text(tex.replace("±", r"$\pm$"))


def readable(table: pd.DataFrame) -> pd.DataFrame:
    """Every cell as text: numbers to four digits, what is missing as a dash."""

    def text(value: Any) -> str:
        if isinstance(value, float):
            return "-" if pd.isna(value) else f"{value:.4g}"
        return "-" if value is None else str(value)

    return pd.DataFrame([[text(v) for v in row] for row in table.itertuples(index=False)], columns=table.columns)


def _grid(name: str, shown: pd.DataFrame) -> Table:
    grid = Table(title=name, caption=CAPTION)
    for column in shown.columns:
        text = column in ("Setup", "Init", "Variant", "Method")
        width = max(map(len, [column, *shown[column]]))
        grid.add_column(column, justify="left" if text else "right", no_wrap=True, min_width=width)
    for row in shown.itertuples(index=False):
        grid.add_row(*row)
    return grid


def print_best(
    name: str, folder: Path, points: pd.DataFrame, table: pd.DataFrame, groups: pd.DataFrame, searches: Sequence[str]
) -> None:
    """table: of best_table; searches: how points were searched, where that was no full grid."""
    console = Console()
    if not console.is_terminal:
        console.width = 200  # of a log nobody knows how wide it is
    if len(table):
        shown = table.drop(columns=["Kind", "Top 3", "KL / token", "Reward accuracy", "Length"])
        grid = _grid(name, shown)
        for column in NARROW:
            if console.measure(grid).minimum > console.width:
                grid = _grid(name, shown := shown.drop(columns=column))
        console.print(grid)
        for line in group_lines(groups):
            console.print(line, highlight=False, soft_wrap=True)
    for line in searches:
        console.print(line, highlight=False, soft_wrap=True)
    for missing in points[points.state != "done"].to_dict("records"):
        label = f"{missing['method']} beta={missing['beta']:g} lr={missing['lr']:g} {missing['variant']}".rstrip()
        console.print(
            f"{missing['state']}: {label}: {missing['error'] or 'not run'}", style="red", highlight=False, markup=False
        )
    for file in ("points.csv", "best.yaml", "figures", "report.html"):
        console.print(f"{file:11} {folder / file}", highlight=False, soft_wrap=True)
