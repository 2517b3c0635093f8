"""Write report.html: tables, figures, samples and costs of a sweep in one self-contained file."""

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
from sweeps.report.tables import (
    BEST,
    NOT_SIGNIFICANT,
    benchmark_table,
    best_table,
    gap_to_best,
    group_lines,
    quality_column,
    with_error,
)
from sweeps.search.successive_halving import points_per_rung

TEMPLATES = Path(__file__).parent / "templates"
MAX_ROWS = 2000  # of the table of all points; points.csv is complete


@dataclass
class Analysis:
    """Everything the aggregation computed."""

    results: Results
    rule: str  # sweep.select: how one point of each method was selected
    best: pd.DataFrame  # of select_points, with intervals
    groups: pd.DataFrame  # of pairwise_against_pointwise
    differences: pd.DataFrame
    gains: pd.DataFrame


def write_report(path: Path, analysis: Analysis, graphics: Sequence[str]) -> None:
    """Write the report; graphics: SVGs of Drawing.save."""
    results, best = analysis.results, analysis.best
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["with_error"] = with_error
    html = environment.get_template("report.html.jinja").render(
        name=results.name,
        sweeps=results.sweeps,
        num_points=len(results.points),
        counts=results.points.state.value_counts().to_dict(),
        rule=analysis.rule,
        searches=results.searches,
        rungs=_rungs(results),
        headlines=_headlines(analysis),
        seeds=int(best.seeds.max()) if len(best) else 0,
        gains=_gains(analysis.gains),
        benchmark=benchmark_table(best, results.scores).to_dict("split"),
        graphics=graphics,
        examples=[(", ".join(filter(None, key)), rows) for key, rows in examples(results, best).items()],
        cost=cost_table(results),
        judge=judge_usage(results),
        published=_published(best),
        failed=results.points[results.points.state != "done"].to_dict("records"),
        all_points=results.points.head(MAX_ROWS).to_dict("records"),
        selected={identity for seeds in best.identities for identity in seeds},
        names=NAMES,
    )
    atomic_write(path, html)


def _headlines(analysis: Analysis) -> list[dict[str, Any]]:
    """Return one table per setup, init and variant; `bar`: low, mean, high of each row on a common scale, percent."""
    best, tables = analysis.best, []
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        table, quality = best_table(group, analysis.differences), quality_column(group)
        names = [c for c in table.columns if c not in ("Setup", "Init", "Variant", "Kind")]
        low, high = group.quality_reporting_low.min(), group.quality_reporting_high.max()
        start, width = low - 0.04 * (high - low), 1.08 * (high - low) or 1.0
        ends = group[["quality_reporting_low", "quality_reporting", "quality_reporting_high"]]
        bars = (100 * (ends - start) / width).to_numpy().round(2).tolist()
        gaps = gap_to_best(group, analysis.differences)
        rows = [
            {"cells": dict(zip(names, cells, strict=True)), "kind": kind, "bar": bar, "gap": gap}
            for kind, cells, bar, gap in zip(group.kind, table[names].to_numpy(), bars, gaps, strict=True)
        ]
        of_group = (analysis.groups[GROUP] == list(key)).all(axis=1)
        tables.append(
            {
                "name": ", ".join(map(str, filter(None, key))),
                "columns": [c for c in names if c not in ("Method", quality)],
                "quality": quality,
                "rows": rows,
                "best": rows[gaps.index(BEST)]["cells"] if BEST in gaps else None,
                "not_significant": gaps.count(NOT_SIGNIFICANT),
                "groups": group_lines(analysis.groups[of_group]),
            }
        )
    return tables


def cost_table(results: Results) -> list[dict[str, Any]]:
    """Return one row per kind of stage: how many were computed, their hours and tokens, and what sharing saved."""
    uses, rows = results.uses(), []
    for kind in ("sft", "reference", "align", "generate", "evaluate"):
        stages = {identity: stage for identity, stage in results.stages.items() if stage["stage"] == kind}
        hours = {i: stage["seconds"] * stage.get("processes", 1) / 3600 for i, stage in stages.items()}
        if stages:
            rows.append(
                {
                    "stage": kind,
                    "computed": len(stages),
                    "hours": sum(hours.values()),
                    "tokens": sum(stage["tokens"] for stage in stages.values()),
                    "uses": sum(uses[identity] for identity in stages),
                    "hours_saved": sum(hours[identity] * max(0, uses[identity] - 1) for identity in stages),
                }
            )
    return rows


def judge_usage(results: Results) -> dict[str, Any] | None:
    """Return the total usage of all judges; None when no judge model was asked."""
    usages = [usage for usage in results.judges if usage.get("answers")]
    if not usages:
        return None
    names = ("answers", "calls", "unparsable", "prompt_tokens", "completion_tokens", "cost")
    total: dict[str, Any] = {name: sum(usage.get(name, 0) for usage in usages) for name in names}
    return {"names": sorted({usage["name"] for usage in usages}), **total}


def _rungs(results: Results) -> list[dict[str, Any]]:
    """Return for each sweep that was a search by rungs the number of points of each method in each rung."""
    return [
        {"name": sweep["name"], "search": sweep["search"], "rows": points_per_rung(sweep).items()}
        for sweep in results.sweeps
        if sweep.get("search") is not None
    ]


def _gains(gains: pd.DataFrame) -> list[dict[str, Any]]:
    rows: list[dict[str, Any]] = []
    for row in gains.to_dict("records"):
        group = ", ".join(str(row[k]) for k in GROUP if gains[k].nunique() > 1 and row[k])
        rows.append({**{str(k): v for k, v in row.items()}, "group": group, "name": NAMES[row["method"]]})
    return rows


def _published(best: pd.DataFrame) -> list[dict[str, Any]]:
    """Return the paper's table next to this sweep's results, for setups of the paper."""
    published, tables = yaml.safe_load(TEMPLATES.with_name("published.yaml").read_text()), []
    for setup in best.setup.unique():
        if setup in published:
            rows = best[(best.setup == setup) & (best.init == "sft") & (best.variant == "")].set_index("method")
            ours = {m: with_error(r.quality_reporting, r.quality_reporting_se, 3) for m, r in rows.iterrows()}
            names = {"sft": "SFT", **NAMES}
            cells = [(names[m], *values, ours.get(m, "-")) for m, values in published[setup]["rows"].items()]
            tables.append({"setup": setup, **published[setup], "rows": cells, "ours": quality_column(rows)})
    return tables
