"""What the chosen points say to the same prompts, beside the baseline and with the judge's reason."""

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

PROMPTS = 6
LONGEST = 4000  # characters of a prompt or response that a page shows


@dataclass
class Example:
    """One prompt; responses: (method, text, verdict or None, reason), the baseline's first where there is one."""

    prompt: str
    responses: list[tuple[str, str, float | None, str]]


def examples(results: Results, best: pd.DataFrame) -> dict[tuple[str, ...], list[Example]]:
    """Setup, init, variant -> the first prompts that all its chosen points have samples for; where points were chosen
    by what a judge says of prompts, of those that had no part in that."""
    found = {}
    for key, group in best.groupby(GROUP, sort=False, dropna=False):
        own = [_of(results, row["identities"][0], row["metric"]) for row in group.to_dict("records")]
        common = [index for index in own[0] if all(index in other for other in own)][:PROMPTS]
        methods = group.method.tolist()
        found[tuple(map(str, key))] = [_example(methods, [rows[index] for rows in own]) for index in common]
    return found


def _example(methods: list[str], rows: list[dict[str, Any]]) -> Example:
    baseline = rows[0].get("baseline")
    first = [("baseline", _cut(baseline), None, "")] if baseline is not None else []
    others = [
        (method, _cut(row["response"]), row.get("verdict"), row.get("reason", ""))
        for method, row in zip(methods, rows, strict=True)
    ]
    return Example(_cut(rows[0]["prompt"]), first + others)


def _of(results: Results, result: str, metric: str) -> dict[int, dict[str, Any]]:
    """Prompt -> the sample of the point with this result, and what was judged of it; the first prompts, in order."""
    folder, samples = results.artifacts(result, "evaluate"), results.artifacts(result, "generate")
    assert folder is not None and samples is not None
    judged = {row["index"]: row for row in _rows(folder / JUDGEMENTS_FILE, None)}
    chose: set[int] = set()
    if metric == "win_rate":
        quality = read_json(folder / QUALITY_FILE)
        chose = {i for i, selects in zip(quality["prompts"], quality["selection"], strict=True) if selects}
    rows = _rows(samples / SAMPLES_FILE, 6 * PROMPTS)
    return {row["index"]: row | judged.get(row["index"], {}) for row in rows if row["index"] not in chose}


def _rows(file: Path, count: int | None) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open() as handle:
        return [json.loads(line) for line in islice(handle, count)]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} […]"
