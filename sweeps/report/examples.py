"""Responses of the selected points to the same prompts, with the baseline's response and the judge's reasons."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from src.store.files import read_json
from src.store.store import JUDGEMENTS_FILE, QUALITY_FILE, SAMPLES_FILE
from sweeps.analysis.results import Results
from sweeps.analysis.selection import GROUP

NUM_PROMPTS = 6
MAX_CHARS = 4000  # of a prompt or response on a page


@dataclass
class Example:
    """One prompt; responses: (method, text, verdict or None, reason), the baseline's first if there is one."""

    prompt: str
    responses: list[tuple[str, str, float | None, str]]


def examples(results: Results, best: pd.DataFrame) -> dict[tuple[str, ...], list[Example]]:
    """Return (setup, init, variant) -> the first prompts for which all its selected points have samples.

    Where points were selected by win rate, these are reporting prompts.
    """
    table = {}
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        samples = [_samples(results, row["identities"][0], row["metric"]) for row in group.to_dict("records")]
        common = [index for index in samples[0] if all(index in other for other in samples)][:NUM_PROMPTS]
        methods = group.method.tolist()
        table[tuple(map(str, key))] = [_example(methods, [rows[index] for rows in samples]) for index in common]
    return table


def _example(methods: list[str], rows: list[dict[str, Any]]) -> Example:
    baseline = rows[0].get("baseline")
    first = [("baseline", _truncate(baseline), None, "")] if baseline is not None else []
    others = [
        (method, _truncate(row["response"]), row.get("verdict"), row.get("reason", ""))
        for method, row in zip(methods, rows, strict=True)
    ]
    return Example(_truncate(rows[0]["prompt"]), first + others)


def _samples(results: Results, result: str, metric: str) -> dict[int, dict[str, Any]]:
    """Return index of the prompt -> the point's sample with its verdict and reason, for the first prompts in order."""
    folder, samples = results.artifacts(result, "evaluate"), results.artifacts(result, "generate")
    assert folder is not None and samples is not None
    judged = {row["index"]: row for row in _rows(folder / JUDGEMENTS_FILE, None)}
    selection: set[int] = set()
    if metric == "win_rate":
        quality = read_json(folder / QUALITY_FILE)
        selection = {i for i, selects in zip(quality["prompts"], quality["selection"], strict=True) if selects}
    rows = _rows(samples / SAMPLES_FILE, 6 * NUM_PROMPTS)
    return {row["index"]: row | judged.get(row["index"], {}) for row in rows if row["index"] not in selection}


def _rows(file: Path, count: int | None) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open() as handle:
        return [json.loads(line) for line in islice(handle, count)]


def _truncate(text: str) -> str:
    return text if len(text) <= MAX_CHARS else f"{text[:MAX_CHARS]} […]"
