"""What the chosen points say to the same prompts, beside the baseline and with the judge's reason."""

from __future__ import annotations

import json
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import pandas as pd

from src.store import JUDGEMENTS_FILE, QUALITY_FILE, SAMPLES_FILE, read_json
from sweeps.results import Results

PROMPTS = 6
LONGEST = 4000  # characters of a prompt or response that a page shows


@dataclass
class Example:
    """One prompt; responses: (method, text, verdict or None, reason), the baseline's first where there is one."""

    prompt: str
    responses: list[tuple[str, str, float | None, str]]


def examples(results: Results, best: pd.DataFrame) -> dict[tuple[str, str, str], list[Example]]:
    """Setup, init, variant -> the first prompts that all its chosen points have samples for; of prompts that a judge
    compares, those of the reporting half."""
    found = {}
    for key, group in best.groupby(["setup", "init", "variant"], sort=False, dropna=False):
        own = [_of(results, row["method"], row["identities"][0]) for row in group.to_dict("records")]
        common = [index for index in own[0] if all(index in other for other in own)] if own else []
        found[key] = [
            Example(_cut(own[0][index]["prompt"]), _responses([other[index] for other in own]))
            for index in common[:PROMPTS]
        ]
    return found  # type: ignore[return-value]


def _responses(rows: list[dict[str, Any]]) -> list[tuple[str, str, float | None, str]]:
    baseline = [("baseline", rows[0]["baseline"], None, "")] if rows[0]["baseline"] is not None else []
    return baseline + [(row["method"], _cut(row["response"]), row["verdict"], row["reason"]) for row in rows]


def _of(results: Results, method: str, result: str) -> dict[int, dict[str, Any]]:
    """Prompt -> the sample of the point with this result, in order, until there are enough."""
    folder = results.artefacts(result, "evaluate")
    samples, sampled = results.artefacts(result, "generate"), results.artefacts(result, "baseline")
    assert folder is not None and samples is not None
    judged = {row["index"]: row for row in _rows(folder / JUDGEMENTS_FILE, None)}
    quality = read_json(folder / QUALITY_FILE)
    reporting = {i for i, selects in zip(quality["prompts"], quality["selects"], strict=True) if not selects}
    wanted, found = 6 * PROMPTS if judged else PROMPTS, {}
    baseline = {} if sampled is None else {row["index"]: row for row in _rows(sampled / SAMPLES_FILE, wanted)}
    for row in _rows(samples / SAMPLES_FILE, wanted):
        index = row["index"]
        if judged and index not in reporting:
            continue
        verdict = judged.get(index, {"verdict": None, "reason": ""})
        found[index] = {
            "method": method,
            "prompt": row["prompt"],
            "response": row["response"],
            "baseline": _cut(baseline[index]["response"]) if index in baseline else None,
            "verdict": verdict["verdict"],
            "reason": verdict["reason"],
        }
    return found


def _rows(file: Path, count: int | None) -> list[dict[str, Any]]:
    if not file.exists():
        return []
    with file.open() as handle:
        return [json.loads(line) for line in islice(handle, count)]


def _cut(text: str) -> str:
    return text if len(text) <= LONGEST else f"{text[:LONGEST]} […]"
