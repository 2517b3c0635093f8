"""Samples and validation scores -> judgements.jsonl, quality.json and result.json, what points are compared by."""

from __future__ import annotations

import json
import math
import random
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from src.config import Point
from src.data import source_of
from src.data.questions import answers_from, questions_of
from src.judges import Comparison, judge_named
from src.methods import METHODS
from src.stages import align, generate
from src.store import (
    DONE,
    JUDGEMENTS_FILE,
    QUALITY_FILE,
    RESULT_FILE,
    STAGE_FILE,
    TRACKED_FILE,
    Attempt,
    read_json,
    write_json,
)
from src.tracking.runs import runs_of

SCHEMA = 1  # of result.json


def run(point: Point, fields: dict[str, Any], upstream: dict[str, Path], attempt: Attempt) -> None:
    samples = generate.read(upstream["samples"])
    validation = [json.loads(line) for line in (upstream["align"] / align.VALIDATION_FILE).open()]
    # Per prompt, so that pairs of one prompt are on one side of the split and count as one observation.
    by_prompt: dict[int, list[float]] = {}
    for line in validation:
        by_prompt.setdefault(line["prompt"], []).append(line["correct"])
    quality = {prompt: math.fsum(values) / len(values) for prompt, values in by_prompt.items()}
    account = None
    if point.judge.name != "none":
        comparisons = _comparisons(point, samples, upstream.get("baseline"))
        judged = judge_named(point.judge.name)(point, comparisons, attempt)
        account = {"name": point.judge.name, **judged.account, "scores": judged.scores}
        with (attempt.out / JUDGEMENTS_FILE).open("w") as handle:
            for sample, compared, verdict in zip(samples, comparisons, judged.verdicts, strict=True):
                row = {"index": sample["index"], "verdict": verdict.value, "reason": verdict.reason}
                row["baseline"] = compared.baseline["response"]
                handle.write(json.dumps(row, ensure_ascii=False) + "\n")
        if point.evaluation.quality == "win_rate":
            quality = {s["index"]: v.value for s, v in zip(samples, judged.verdicts, strict=True)}

    chosen = selection_items(list(quality), point.evaluation.selection_fraction, point.evaluation.split_seed)
    write_json(
        attempt.out / QUALITY_FILE,
        {"prompts": list(quality), "values": list(quality.values()), "selects": [i in chosen for i in quality]},
    )
    ratios = [s["logp"] - s["reference_logp"] for s in samples]
    lengths = [s["tokens"] for s in samples]
    result = {
        "schema": SCHEMA,
        "point": {
            "setup": point.setup.name,
            "method": point.method.name,
            "kind": METHODS[point.method.name].kind,
            "init": point.init.name,
            "beta": point.beta,
            "lr": point.lr,
            "seed": point.seed,
        },
        "quality": {"metric": point.evaluation.quality, **mean_and_error(list(quality.values()))},
        "splits": {
            "selection": mean_and_error([v for i, v in quality.items() if i in chosen]),
            "reporting": mean_and_error([v for i, v in quality.items() if i not in chosen]),
        },
        "judge": account,
        "kl": {"per_sequence": mean_and_error(ratios), "per_token": ratio_and_error(ratios, lengths)},
        "reward_accuracy": mean_and_error([line["correct"] for line in validation]),
        "reward_margin": mean_and_error([line["margin"] for line in validation]),
        "response_tokens": mean_and_error(lengths),
        "finished": sum(s["finished"] for s in samples) / len(samples),
        "dropped": read_json(upstream["align"] / "data.json")["dropped"],
        "stages": _stages(upstream, attempt),
    }
    write_json(attempt.out / RESULT_FILE, result)
    write_json(attempt.out / TRACKED_FILE, asdict(replace(runs_of([point])[-1], group=None)))
    attempt.step(1, 1)


def _comparisons(point: Point, samples: list[dict[str, Any]], sampled: Path | None) -> list[Comparison]:
    """Each sample beside the baseline's sample, the chosen response of the first held-out pair, or the answer in the
    baseline's file, of its prompt."""
    questions = questions_of(point)
    baselines: dict[int, dict[str, Any]]
    if sampled is not None:
        baselines = {row["index"]: row for row in generate.read(sampled)}
    elif point.judge.baseline == "chosen":
        chosen: dict[tuple[str, ...], str] = {}
        for pair in source_of(point).pairs("validation"):
            chosen.setdefault(pair.prompt.key, pair.chosen)
        baselines = {i: {"response": chosen[q.prompt.key]} for i, q in enumerate(questions)}
    else:
        assert point.judge.baseline is not None
        baselines = dict(enumerate(answers_from(point.judge.baseline, questions, "judge.baseline")))
    return [Comparison(questions[s["index"]].prompt, s, {"finished": True} | baselines[s["index"]]) for s in samples]


def selection_items(items: list[int], fraction: float, seed: int) -> set[int]:
    """Which prompts choose hyper-parameters; the others report. The same ones for every point of a setup."""
    shuffled = sorted(items)
    random.Random(seed).shuffle(shuffled)
    return set(shuffled[: min(len(items) - 1, max(1, round(fraction * len(items))))])


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Mean, its standard error (ddof 1; null for fewer than two values), and n."""
    n = len(values)
    if n == 0:
        return {"value": None, "se": None, "n": 0}
    mean = math.fsum(values) / n
    variance = math.fsum((v - mean) ** 2 for v in values) / (n - 1) if n > 1 else None
    return {"value": mean, "se": None if variance is None else math.sqrt(variance / n), "n": n}


def ratio_and_error(totals: list[float], counts: list[int]) -> dict[str, float | None]:
    """Sum of totals over sum of counts, its standard error by the delta method over sequences."""
    n, tokens = len(totals), sum(counts)
    if tokens == 0:
        return {"value": None, "se": None, "n": n}
    ratio = math.fsum(totals) / tokens
    if n < 2:
        return {"value": ratio, "se": None, "n": n}
    residual = math.fsum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True)) / (n - 1)
    return {"value": ratio, "se": math.sqrt(residual / n) / (tokens / n), "n": n}


def _stages(upstream: dict[str, Path], attempt: Attempt) -> list[dict[str, Any]]:
    """Identity, seconds and tokens of every stage this result rests on, found through the artefacts themselves, and of
    this one."""
    own = {"stage": "evaluate", "identity": attempt.identity, "seconds": round(attempt.seconds, 3), "tokens": 0}
    found: dict[str, dict[str, Any]] = {attempt.identity: {**own, "processes": 1}}
    folders = list(upstream.values())
    while folders:
        folder = folders.pop()
        done = read_json(folder / DONE)
        if done["identity"] in found:
            continue
        found[done["identity"]] = {key: done[key] for key in ("stage", "identity", "seconds", "tokens", "processes")}
        for identity in read_json(folder / STAGE_FILE)["upstream"].values():
            folders += folder.parent.parent.glob(f"*/{identity}")
    return sorted(found.values(), key=lambda stage: (stage["stage"], stage["identity"]))
