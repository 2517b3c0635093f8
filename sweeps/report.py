"""What a person reads of a sweep: tables, figures, report.html, and the table on the terminal."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader
from rich.console import Console
from rich.table import Table

from sweeps.figures import NAMES
from sweeps.record import read_sweep

CAPTION = """chosen on one half of the prompts, measured on the other (95 % interval)
shortlist: points that cannot be told from the best one"""


def best_table(best: pd.DataFrame) -> pd.DataFrame:
    """The best point of every method as people read it."""
    several = {key: best[key].nunique() > 1 for key in ("setup", "init", "variant", "seeds")}
    rows = []
    for row in best.to_dict("records"):
        shown = {key.capitalize(): row[key] for key, more in several.items() if more}
        rows.append(
            shown
            | {
                "Method": NAMES[row["method"]],
                "Kind": row["kind"],
                "beta": f"{row['beta']:g}",
                "lr": f"{row['lr']:g}",
                _quality_name(best): _with_interval(row),
                "Shortlist": row["shortlist"],
                "KL / sequence": _with_error(row["kl_sequence"], row["kl_sequence_se"], 2),
                "KL / token": _with_error(row["kl_token"], row["kl_token_se"], 3),
                "Reward accuracy": _with_error(row["reward_accuracy"], None, 3),
                "Length": _with_error(row["response_tokens"], None, 1),
            }
        )
    return pd.DataFrame(rows)


def _quality_name(best: pd.DataFrame) -> str:
    names = best.metric.unique()
    return names[0].replace("_", " ").capitalize() if len(names) == 1 else "Quality"


def _with_error(value: float | None, error: float | None, digits: int) -> str:
    if value is None or pd.isna(value):
        return "-"
    return f"{value:.{digits}f}" + ("" if error is None or pd.isna(error) else f" ± {error:.{digits}f}")


def _with_interval(row: dict[Hashable, Any]) -> str:
    low, high = row["quality_reporting_low"], row["quality_reporting_high"]
    return f"{row['quality_reporting']:.3f} [{low:.3f}, {high:.3f}]"


def group_lines(groups: pd.DataFrame) -> list[str]:
    """What the permutation test found, a sentence a setup, init and variant."""
    lines = []
    for row in groups.to_dict("records"):
        where = ", ".join(str(row[k]) for k in ("setup", "init", "variant") if len(groups) > 1 and row[k])
        lines.append(
            f"{where + ': ' if where else ''}{row['pairwise']} pairwise methods against {row['pointwise']} pointwise: "
            f"{row['difference']:+.3f}, p = {row['p']:.3f} ({row['splits']} splits, one-sided)"
        )
    return lines


def write_tables(folder: Path, best: pd.DataFrame, others: dict[str, pd.DataFrame]) -> None:
    """tables/best.md, .csv, .tex, and NAME.csv of the others."""
    target = folder / "tables"
    target.mkdir(exist_ok=True)
    for name, other in others.items():
        other.to_csv(target / f"{name}.csv", index=False)
    table = best_table(best)
    lines = ["| " + " | ".join(table.columns) + " |", "|" + "---|" * len(table.columns)]
    lines += ["| " + " | ".join(map(str, row)) + " |" for row in table.itertuples(index=False)]
    (target / "best.md").write_text("\n".join(lines) + "\n")
    table.to_csv(target / "best.csv", index=False)
    cells = [
        [str(c).replace("±", r"$\pm$").replace("_", r"\_") for c in row]
        for row in [list(table.columns), *table.to_numpy().tolist()]
    ]
    body = [" & ".join(row) + r" \\" for row in cells]
    tex = [
        rf"\begin{{tabular}}{{{'l' * len(table.columns)}}}",
        r"\hline",
        *body[:1],
        r"\hline",
        *body[1:],
        r"\hline",
        r"\end{tabular}",
    ]
    (target / "best.tex").write_text("\n".join(tex) + "\n")


def write_report(
    folder: Path, points: pd.DataFrame, best: pd.DataFrame, groups: pd.DataFrame, svgs: list[Path], rule: str
) -> None:
    """report.html: one file that needs nothing beside it. rule: how points were chosen, as in sweep.select."""
    environment = Environment(loader=FileSystemLoader(Path(__file__).parent), autoescape=True)
    graphics = []
    for path in svgs:
        text = path.read_text()
        graphics.append(text[text.index("<svg") :])
    shown = points.copy()
    for name, error, digits in (
        ("quality_selection", "quality_selection_se", 3),
        ("quality_reporting", "quality_reporting_se", 3),
        ("kl_sequence", "kl_sequence_se", 2),
    ):
        shown[name] = [_with_error(v, e, digits) for v, e in zip(points[name], points[error], strict=True)]
    html = environment.get_template("report.html.jinja").render(
        sweep=read_sweep(folder),
        rule=rule,
        counts=points.state.value_counts().to_dict(),
        best=best_table(best),
        groups=group_lines(groups),
        chosen={identity for seeds in best.identities for identity in seeds},
        seeds=int(best.seeds.max()) if len(best) else 0,
        points=shown.to_dict("records"),
        names=NAMES,
        figures=graphics,
        minutes=points.seconds.sum() / 60,
    )
    (folder / "report.html").write_text(html)


def print_best(folder: Path, points: pd.DataFrame, best: pd.DataFrame, groups: pd.DataFrame) -> None:
    console = Console()
    if len(best):
        shown = best_table(best).drop(columns=["Kind", "KL / token", "Reward accuracy", "Length"])
        table = Table(title=folder.name, caption=CAPTION)
        for column in shown.columns:
            table.add_column(
                column,
                justify="left" if column in ("Setup", "Init", "Variant", "Method", "Kind") else "right",
                no_wrap=True,
            )
        for row in shown.itertuples(index=False):
            table.add_row(*map(str, row))
        console.print(table)
        for line in group_lines(groups):
            console.print(line, highlight=False, soft_wrap=True)
    for missing in points[points.state != "done"].to_dict("records"):
        label = f"{missing['method']} beta={missing['beta']:g} lr={missing['lr']:g} {missing['variant']}".rstrip()
        console.print(f"{missing['state']}: {label}: {missing['error'] or 'not run'}", style="red", highlight=False)
    for name in ("points.csv", "best.yaml", "figures", "report.html"):
        console.print(f"{name:11} {folder / name}", highlight=False, soft_wrap=True)
