"""report.html: everything a reader of a sweep wants, in one file that needs nothing beside it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader

from src.store.files import atomic_write
from sweeps.analysis.results import Results
from sweeps.analysis.selection import GROUP
from sweeps.report.examples import examples
from sweeps.report.plot_style import NAMES
from sweeps.report.tables import against_highest, benchmark_table, best_table, group_lines, quality_name, with_error
from sweeps.search import successive_halving as halving

TEMPLATES = Path(__file__).parent / "templates"
ROWS = 2000  # of the table of all points; points.csv has them all


@dataclass
class Found:
    """What aggregation has worked out."""

    results: Results
    rule: str  # by which one point of each method was chosen, as sweep.select
    best: pd.DataFrame  # of chosen_points, with intervals
    groups: pd.DataFrame  # of pairwise_against_pointwise
    differences: pd.DataFrame
    gains: pd.DataFrame


def write_report(folder: Path, found: Found, graphics: Sequence[str]) -> None:
    """graphics: SVGs as Drawing.save returns them."""
    results, best = found.results, found.best
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = environment.get_template("report.html.jinja").render(
        name=results.name,
        sweeps=results.sweeps,
        points=len(results.points),
        counts=results.points.state.value_counts().to_dict(),
        rule=found.rule,
        searches=results.searches,
        rungs=_rungs(results),
        headlines=_headlines(found),
        seeds=int(best.seeds.max()) if len(best) else 0,
        gains=_gains(found.gains),
        benchmark=benchmark_table(best, results.scores).to_dict("split"),
        graphics=graphics,
        examples=[(", ".join(filter(None, key)), own) for key, own in examples(results, best).items()],
        cost=cost_table(results),
        judge=judge_line(results),
        published=_published(best),
        failed=results.points[results.points.state != "done"].to_dict("records"),
        all_points=_all_points(results.points.head(ROWS), {i for own in best.identities for i in own}),
        names=NAMES,
    )
    atomic_write(folder / "report.html", html)


def _headlines(found: Found) -> list[dict[str, Any]]:
    """One table a setup, init and variant: its rows with where their interval lies on a common scale, in percent."""
    best, tables = found.best, []
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        table, quality = best_table(group, found.differences), quality_name(group)
        names = [c for c in table.columns if c not in ("Setup", "Init", "Variant", "Kind")]
        low, high = group.quality_reporting_low.min(), group.quality_reporting_high.max()
        low, reach = low - 0.04 * (high - low), 1.08 * (high - low) or 1.0
        bars = 100 * (group[["quality_reporting_low", "quality_reporting", "quality_reporting_high"]] - low) / reach
        ties = against_highest(group, found.differences)
        rows = [
            {"cells": dict(zip(names, cells, strict=True)), "kind": row["kind"], "bar": bar, "tie": tie}
            for row, cells, bar, tie in zip(
                group.to_dict("records"), table[names].to_numpy(), bars.to_numpy().round(2).tolist(), ties, strict=True
            )
        ]
        own = found.groups
        for name, value in zip(GROUP, key, strict=True):
            own = own[own[name] == value]
        tables.append(
            {
                "name": ", ".join(map(str, filter(None, key))),
                "columns": [c for c in names if c not in ("Method", quality)],
                "quality": quality,
                "rows": rows,
                "highest": rows[ties.index("top")]["cells"] if "top" in ties else None,
                "tied": ties.count("tied"),
                "groups": group_lines(own),
            }
        )
    return tables


def cost_table(results: Results) -> list[dict[str, Any]]:
    """One row a kind of stage: how many were computed, in what time, and what sharing them between points spared."""
    uses, rows = results.uses(), []
    for kind in ("sft", "reference", "align", "generate", "evaluate"):
        own = {identity: stage for identity, stage in results.stages.items() if stage["stage"] == kind}
        hours = {i: stage["seconds"] * stage.get("processes", 1) / 3600 for i, stage in own.items()}
        if own:
            rows.append(
                {
                    "stage": kind,
                    "computed": len(own),
                    "hours": sum(hours.values()),
                    "tokens": sum(stage["tokens"] for stage in own.values()),
                    "uses": sum(uses[identity] for identity in own),
                    "spared": sum(hours[identity] * max(0, uses[identity] - 1) for identity in own),
                }
            )
    return rows


def judge_line(results: Results) -> dict[str, Any] | None:
    """What all judges took together; None where nobody was asked."""
    asked = [account for account in results.judges if account.get("answers")]
    if not asked:
        return None
    names = ("answers", "calls", "unparsable", "prompt_tokens", "completion_tokens", "cost")
    total: dict[str, Any] = {name: sum(account.get(name, 0) for account in asked) for name in names}
    return {"names": sorted({account["name"] for account in asked}), **total}


def _rungs(results: Results) -> list[dict[str, Any]]:
    """Of each sweep that went rung by rung: how many points of each method were in each."""
    return [
        {"name": sweep["name"], "shares": sweep["search"]["rungs"], "rows": rows, "search": sweep["search"]}
        for sweep in results.sweeps
        if (rows := halving.entered(sweep))
    ]


def _gains(gains: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in gains.to_dict("records"):
        where = ", ".join(str(row[k]) for k in GROUP if gains[k].nunique() > 1 and row[k])
        rows.append({**{str(k): v for k, v in row.items()}, "where": where, "name": NAMES[row["method"]]})
    return rows


def _published(best: pd.DataFrame) -> list[dict[str, Any]]:
    """The paper's table beside ours, of setups it has."""
    known, tables = yaml.safe_load(TEMPLATES.with_name("published.yaml").read_text()), []
    for setup in best.setup.unique():
        if setup in known:
            own = best[(best.setup == setup) & (best.init == "sft") & (best.variant == "")].set_index("method")
            ours = {m: with_error(r.quality_reporting, r.quality_reporting_se, 3) for m, r in own.iterrows()}
            names = {"sft": "SFT", **NAMES}
            rows = [(names[m], *values, ours.get(m, "-")) for m, values in known[setup]["rows"].items()]
            tables.append({"setup": setup, **known[setup], "rows": rows, "ours": quality_name(own)})
    return tables


def _all_points(points: pd.DataFrame, chosen: set[str]) -> list[dict[str, Any]]:
    rows = []
    for row in points.to_dict("records"):
        where = [row["setup"]] + [row["init"]] * (row["init"] != "sft") + [row["variant"]] * bool(row["variant"])
        rows.append(
            {
                "where": " ".join(map(str, where)),
                "method": NAMES[row["method"]],
                "beta": f"{row['beta']:g}",
                "lr": f"{row['lr']:g}",
                "seed": row["seed"],
                "selection": with_error(row["quality_selection"], row["quality_selection_se"], 3),
                "reporting": with_error(row["quality_reporting"], row["quality_reporting_se"], 3),
                "kl": with_error(row["kl_sequence"], row["kl_sequence_se"], 2),
                "seconds": with_error(row["seconds"], None, 1),
                "stop": f"{row['stop']:g}",
                "state": row["state"],
                "chosen": row["identity"] in chosen,
            }
        )
    return rows
