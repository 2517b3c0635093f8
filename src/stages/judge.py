"""Samples -> verdicts of one judge: those by which points are compared, or of a further judge of the same samples."""

from __future__ import annotations

import math
import random
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from src.config.judge_rules import naming_judge
from src.judges import Comparison, Judged, Verdict, judge_function
from src.planning.identity import EvaluateInputs, FurtherJudgeInputs
from src.planning.resources import Resources
from src.stages import generate
from src.stages.averages import by_prompt, mean_and_error, selection_prompts
from src.stages.comparisons import comparisons_of
from src.stages.measurements import of_splits
from src.store.attempt import Attempt
from src.store.files import read_json, write_json, write_jsonl
from src.store.store import JUDGE_FILE, JUDGEMENTS_FILE, RESULT_SCHEMA

SUMS = ("answers", "calls", "unparsable", "prompt_tokens", "completion_tokens", "cost")  # of usage, over both rounds


@dataclass(frozen=True)
class Judgements:
    """Samples with their verdicts, in order. usage: of the judge, with its name, and its scores of a benchmark."""

    samples: list[dict[str, Any]]
    comparisons: list[Comparison]
    verdicts: list[Verdict]
    usage: dict[str, Any]

    @property
    def quality(self) -> dict[int, float]:
        """Prompt -> the mean of its verdicts."""
        values = by_prompt((s["index"], v.value) for s, v in zip(self.samples, self.verdicts, strict=True))
        return {prompt: math.fsum(several) / len(several) for prompt, several in values.items()}

    @property
    def columns(self) -> dict[str, list[Any]]:
        """What analyses of judges need, by sample.

        first: preferences for the answer that was shown first, one for each question that showed two. length: of the
        response in characters, minus that of the baseline where there is one.
        """
        lengths = [len(c.response["response"]) - len(c.baseline.get("response", "")) for c in self.comparisons]
        return {
            "index": [s["index"] for s in self.samples],
            "sample": [s.get("sample", 0) for s in self.samples],
            "turn": [s.get("turn", 1) for s in self.samples],
            "value": [v.value for v in self.verdicts],
            "first": [list(v.first) for v in self.verdicts],
            "length": lengths,
        }

    def write(self, folder: Path) -> None:
        """Write judgements.jsonl."""
        rows = (
            {name: s[name] for name in ("index", "sample", "turn") if name in s}
            | {"verdict": v.value, "reason": v.reason, "baseline": c.baseline.get("response")}
            for s, c, v in zip(self.samples, self.comparisons, self.verdicts, strict=True)
        )
        write_jsonl(folder / JUDGEMENTS_FILE, rows)


def run(inputs: FurtherJudgeInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    attempt.step(0, 1)
    samples = generate.read(upstream["samples"])
    prompts = list(dict.fromkeys(sample["index"] for sample in samples))
    selection = selection_prompts(prompts, inputs.selection_fraction, inputs.split_seed)
    with naming_judge(f"judges.{inputs.name}"):
        judgements = judge_samples(inputs, resources, samples, selection, upstream, attempt)
    if judgements is None:
        return
    judgements.write(attempt.out)
    quality = judgements.quality
    result = {
        "schema": RESULT_SCHEMA,
        "name": inputs.name,
        "metric": inputs.metric,
        "usage": judgements.usage,
        "quality": mean_and_error(list(quality.values())),
        "splits": of_splits(quality, selection),
        "verdicts": judgements.columns,
    }
    write_json(attempt.out / JUDGE_FILE, result)
    attempt.step(1, 1)


def read(folder: Path) -> dict[str, Any]:
    """Return what `run` has written."""
    return read_json(folder / JUDGE_FILE)


def judge_samples(
    inputs: EvaluateInputs,
    resources: Resources,
    samples: list[dict[str, Any]],
    selection: set[int],
    upstream: Mapping[str, Path],
    attempt: Attempt,
) -> Judgements | None:
    """Judge samples, all or those of selection prompts; None on ranks that only take part.

    With `repeated_prompts` the questions of so many prompts, drawn by the seed of the split, are asked a second time
    first, and `repeated` of the usage says how many verdicts were equal.
    """
    assert inputs.judge is not None
    judge = judge_function(inputs.judge.name)
    asked = [sample for sample in samples if inputs.judged == "all" or sample["index"] in selection]
    comparisons = comparisons_of(inputs, resources, asked, dict(upstream))
    again, second = _to_repeat(inputs, samples, asked), None
    if again:
        # Less than the whole benchmark: its scores are left out.
        repeated = replace(inputs, judge=replace(inputs.judge, repeat=1), judged="selection")
        second = judge(repeated, resources, [comparisons[i] for i in again], attempt)
    judged = judge(inputs, resources, comparisons, attempt)
    if not attempt.is_main_process:
        return None
    # A benchmark's scores are of all its prompts.
    usage = {"name": inputs.judge.name, **judged.usage, "scores": judged.scores if inputs.judged == "all" else {}}
    if second is not None:
        usage |= {name: usage[name] + second.usage[name] for name in SUMS if name in usage}
        usage["repeated"] = _noise([asked[i]["index"] for i in again], [judged.verdicts[i] for i in again], second)
    return Judgements(asked, comparisons, judged.verdicts, usage)


def _to_repeat(inputs: EvaluateInputs, samples: list[dict[str, Any]], asked: list[dict[str, Any]]) -> list[int]:
    """Return which of the samples that are asked about are judged twice: those of the first prompts of the split."""
    prompts = sorted({sample["index"] for sample in samples})
    random.Random(inputs.split_seed).shuffle(prompts)
    chosen = set(prompts[: inputs.repeated_prompts])
    return [i for i, sample in enumerate(asked) if sample["index"] in chosen]


def _noise(prompts: list[int], verdicts: list[Verdict], second: Judged) -> dict[str, Any]:
    """Return the share of equal verdicts, and the mean distance of both, with errors over prompts."""
    pairs = [(a.value, b.value) for a, b in zip(verdicts, second.verdicts, strict=True)]
    rows = by_prompt(zip(prompts, pairs, strict=True)).values()
    return {
        "prompts": len(rows),
        "verdicts": len(pairs),
        "equal": mean_and_error([sum(a == b for a, b in row) / len(row) for row in rows]),
        "distance": mean_and_error([math.fsum(abs(a - b) for a, b in row) / len(row) for row in rows]),
    }
