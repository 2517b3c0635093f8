"""Write report.html: tables, figures, samples and costs of a sweep in one self-contained file."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import pandas as pd
from jinja2 import Environment, FileSystemLoader

from src.errors import DamagedFile, warn
from src.store.files import atomic_write, read_jsonl
from src.store.store import JUDGEMENTS_FILE, SAMPLES_FILE, sample_key
from src.store.usage import KINDS, usage_of
from sweeps.analysis.results import Results, read_quality
from sweeps.analysis.selection import GROUP
from sweeps.report.diagnosis import diagnosis_sections
from sweeps.report.judge_tables import judge_sentences, judge_tables
from sweeps.report.paper_tables import PaperTable
from sweeps.report.plot_style import NAMES
from sweeps.report.published import published_tables
from sweeps.report.tables import PER_TOKEN, best_table, group_lines, not_asked, quality_column, with_error
from sweeps.search.successive_halving import points_per_rung

TEMPLATES = Path(__file__).parent / "templates"
MAX_ROWS = 2000  # of the table of all points; points.csv is complete
NUM_PROMPTS = 6  # with their responses
MAX_CHARS = 4000  # of a prompt or response on a page


def write_report(
    path: Path,
    results: Results,
    rule: str,
    best: pd.DataFrame,
    tables: dict[str, pd.DataFrame],
    of_paper: dict[str, PaperTable],
    graphics: list[str],
) -> None:
    """Write the report.

    rule: sweep.select, how one point of each method was selected. best: of with_intervals. tables: as aggregate writes
    them. of_paper: of paper_tables. graphics: SVGs of Drawing.save.
    """
    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    environment.filters["with_error"] = with_error
    html = environment.get_template("report.html.jinja").render(
        results=results,
        counts=results.points.state.value_counts().to_dict(),
        rule=rule,
        searches=[*results.searches, *filter(None, [not_asked(results)])],
        points_per_rung=points_per_rung,
        headlines=_headlines(best, tables),
        metrics=[metric.split(" (")[0] for metric in best.metric.unique()],
        seeds=int(best.seeds.max()) if len(best) else 0,
        gains=_gains(tables["gains"]),
        benchmark=tables["benchmark"].to_dict("split"),
        sources=tables["sources"].to_dict("split"),
        capability=_capability(tables["capability"]).to_dict("split"),
        judge_sentences=judge_sentences(
            _selecting(best, tables["judges"]),
            *(tables[name] for name in ("judges", "judge_agreement", "judge_disagreements")),
        ),
        judge_tables=[table.to_dict("split") for table in judge_tables(tables) if len(table)],
        diagnosis=diagnosis_sections(tables["diagnosis"]),
        sft=tables["sft"].to_dict("split"),
        graphics=graphics,
        examples=examples(results, best),
        cost=cost_table(results),
        judge=judge_usage(results),
        published=published_tables(results, best),
        of_paper=[table for table in of_paper.values() if table.rows],
        all_points=results.points.head(MAX_ROWS).to_dict("records"),
        selected={identity for seeds in best.identities for identity in seeds},
        names=NAMES,
    )
    atomic_write(path, html.encode(errors="backslashreplace"))


def _selecting(best: pd.DataFrame, leanings: pd.DataFrame) -> dict[tuple[Any, ...], str]:
    """Return setup, init and variant -> by which judge points were selected, or by which measure."""
    metrics, selecting = {key: rows.metric.iloc[0] for key, rows in best.groupby(GROUP, dropna=False)}, {}
    for key, rows in leanings.groupby(GROUP, dropna=False) if len(leanings) else ():
        names = [] if metrics.get(key) == "reward_accuracy" else rows.judge[~rows.further].astype(str).tolist()
        selecting[key] = " and ".join(names) or "reward accuracy"
    return selecting


def _headlines(best: pd.DataFrame, all_tables: dict[str, pd.DataFrame]) -> list[dict[str, Any]]:
    """Return one table per setup, init and variant; `bar`: low, mean, high of each row on a common scale, percent."""
    tables, tests = [], all_tables["pairwise_pointwise"]
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        table, quality = best_table(group, all_tables["differences"]).drop(columns=PER_TOKEN), quality_column(group)
        low, high = group.quality_reporting_low.min(), group.quality_reporting_high.max()
        start, width = low - 0.04 * (high - low), 1.08 * (high - low) or 1.0
        ends = group[["quality_reporting_low", "quality_reporting", "quality_reporting_high"]]
        bars = (100 * (ends - start) / width).to_numpy().round(2).tolist()
        tables.append(
            {
                "name": ", ".join(map(str, filter(None, key))),
                "columns": [column for column in table.columns if column not in ("Method", "Kind", quality)],
                "quality": quality,
                "points": table.assign(bar=bars).to_dict("records"),
                "groups": group_lines(tests[(tests[GROUP] == list(key)).all(axis=1)]),
            }
        )
    return tables


def cost_table(results: Results) -> list[dict[Hashable, Any]]:
    """Return one row per kind of stage: how many were computed, their hours and tokens, and what sharing saved.

    hours: of accelerators, `waiting` ones among them (`src.store.usage`).
    """
    if not results.stages:
        return []
    stages = pd.DataFrame(list(results.stages.values()))
    usage = [usage_of(stage) for stage in results.stages.values()]
    stages["waiting"] = [one.waiting / 3600 for one in usage]
    stages["hours"] = [(one.in_use + one.waiting) / 3600 for one in usage]
    stages["uses"] = stages.identity.map(results.uses()).fillna(0).astype(int)
    stages["hours_saved"] = stages.hours * (stages.uses - 1).clip(lower=0)
    kinds = stages.groupby("stage")
    table = kinds[["hours", "waiting", "tokens", "uses", "hours_saved"]].sum().assign(computed=kinds.size())
    order = [kind for kind in KINDS if kind in table.index]
    return table.loc[order].reset_index().to_dict("records")


def judge_usage(results: Results) -> dict[str, Any]:
    """Return the total usage of all judges that asked a model."""
    usages = [usage for _, usage in results.usages if usage.get("answers")]
    names = ("answers", "calls", "unparsable", "prompt_tokens", "completion_tokens", "cost")
    total: dict[str, Any] = {name: sum(usage.get(name, 0) for usage in usages) for name in names}
    models = sorted({model for usage in usages for model in usage.get("models", ())})
    dates = sorted(date for usage in usages for date in usage.get("answered", ()))
    answered = [dates[0], dates[-1]] if dates else []
    return {"names": sorted({usage["name"] for usage in usages}), "models": models, "answered": answered, **total}


def _capability(changes: pd.DataFrame) -> pd.DataFrame:
    """Return the table of capability as text. changes: of capability_changes."""
    rows = []
    for row in changes.to_dict("records"):
        varying = {name.capitalize(): row[name] for name in GROUP if changes[name].nunique() > 1}
        point = {
            "Method": NAMES[row["method"]],
            "beta": f"{row['beta']:g}",
            "lr": f"{row['lr']:g}",
            "Task": row["task"],
        }
        scores = {"Score": f"{row['score']:.3f}", "SFT model": f"{row['sft']:.3f}"}
        change = f"{row['difference']:+.3f} [{row['low']:+.3f}, {row['high']:+.3f}]"
        rows.append(
            varying | point | scores | {"Change": change, "p": f"{row['p']:.2g}", "Documents": str(row["documents"])}
        )
    return pd.DataFrame(rows)


def _gains(gains: pd.DataFrame) -> list[dict[Hashable, Any]]:
    varying = [column for column in GROUP if gains[column].nunique() > 1]
    groups = [", ".join(filter(None, row)) for row in gains[varying].astype(str).to_numpy()]
    return gains.assign(group=groups).to_dict("records")


def examples(results: Results, best: pd.DataFrame) -> dict[str, list[dict[str, Any]]]:
    """Return setup, init and variant -> the first prompts for which all its selected points with samples have one.

    `responses` of a prompt: (method, text, verdict or None, reason), the baseline's first if there is one. Where points
    were selected by what prompts have, these are reporting prompts.
    """
    table = {}
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        samples = [_samples(results, row["identities"][0], row["metric"]) for row in group.to_dict("records")]
        # Without a point whose samples are damaged the others are shown.
        methods = [method for method, rows in zip(group.method, samples, strict=True) if rows]
        samples = [rows for rows in samples if rows]
        common = [index for index in samples[0] if all(index in other for other in samples)] if samples else []
        name = ", ".join(map(str, filter(None, key)))
        table[name] = [
            _example(methods, [rows[index] for rows in samples], group.metric.iloc[0]) for index in common[:NUM_PROMPTS]
        ]
    return table


def _example(methods: list[str], rows: list[dict[str, Any]], metric: str) -> dict[str, Any]:
    baseline = rows[0].get("baseline")
    responses = [] if baseline is None else [("baseline", _truncate(baseline), None, "")]
    for method, row in zip(methods, rows, strict=True):
        responses.append((method, _truncate(row["response"]), row.get("verdict"), row.get("reason", "")))
    words = {1: "right", 0: "wrong"} if baseline is None else {1: "win", 0.5: "tie", 0: "loss"}
    words = {} if metric == "rating" else words
    return {"prompt": _truncate(rows[0]["prompt"]), "responses": responses, "words": words}


def _samples(results: Results, result: str, metric: str) -> dict[int, dict[str, Any]]:
    """Return index of the prompt -> the point's first sample with its verdict and reason, for the first prompts."""
    folder, samples = results.artifacts(result, "evaluate"), results.artifacts(result, "generate")
    assert folder is not None and samples is not None
    judged = {sample_key(row): row for row in _rows(folder / JUDGEMENTS_FILE, ("index", "verdict"))}
    selection: set[int] = set()
    if metric != "reward_accuracy":
        quality = read_quality(folder)
        selection = {i for i, selects in zip(quality["prompts"], quality["selection"], strict=True) if selects}
    rows = [
        row for row in _rows(samples / SAMPLES_FILE, ("index", "prompt", "response")) if sample_key(row)[1:] == (0, 1)
    ]
    shown = [row for row in rows[: 6 * NUM_PROMPTS] if row["index"] not in selection]
    return {row["index"]: row | judged.get(sample_key(row), {}) for row in shown}


def _rows(file: Path, keys: tuple[str, ...]) -> list[dict[str, Any]]:
    """Return the rows of a file that have these keys; none, with a warning, when it is damaged."""
    try:
        return list(read_jsonl(file, keys))
    except FileNotFoundError:
        return []
    except DamagedFile as error:
        warn(f"{error}; the report is without it")
        return []


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} […]"
