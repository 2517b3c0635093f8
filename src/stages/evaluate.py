"""Samples and validation scores -> judgements.jsonl, quality.json, and result.json, which compares points."""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Iterable
from functools import partial
from pathlib import Path
from typing import Any, TypeVar

from src.errors import StageError
from src.judges import judge_function
from src.methods import METHODS
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.stages import capability, generate, validation
from src.stages.comparisons import comparisons_of
from src.store.attempt import Attempt
from src.store.files import read_json, read_jsonl, write_json, write_jsonl
from src.store.provenance import provenance
from src.store.store import (
    CAPABILITY_FILE,
    DONE,
    JUDGEMENTS_FILE,
    QUALITY_FILE,
    RESULT_FILE,
    RESULT_SCHEMA,
    STAGE_FILE,
)

T = TypeVar("T")


def run(inputs: EvaluateInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    attempt.step(0, 1)
    samples = generate.read(upstream["samples"])
    pairs = list(read_jsonl(upstream["align"] / validation.FILE))
    measured = by_prompt((line["prompt"], line["correct"]) for line in pairs)
    is_judged = inputs.metric != "reward_accuracy"
    prompts = list(dict.fromkeys(sample["index"] for sample in samples) if is_judged else measured)
    if len(prompts) < 2:
        raise StageError(
            f"evaluation: {len(prompts)} prompt to compare points by; selection and reporting need one each, at least 2"
        )
    selection = selection_prompts(prompts, inputs.selection_fraction, inputs.split_seed)
    usage, several, judged_samples = None, {}, []
    if inputs.judge is not None:
        asked = [sample for sample in samples if inputs.judged == "all" or sample["index"] in selection]
        comparisons = comparisons_of(inputs, resources, asked, upstream)
        judged = judge_function(inputs.judge.name)(inputs, resources, comparisons, attempt)
        if not attempt.is_main_process:
            return
        # A benchmark's scores are of all its prompts.
        usage = {"name": inputs.judge.name, **judged.usage, "scores": judged.scores if inputs.judged == "all" else {}}
        rows = (
            {name: s[name] for name in ("index", "sample", "turn") if name in s}
            | {"verdict": v.value, "reason": v.reason, "baseline": c.baseline.get("response")}
            for s, c, v in zip(asked, comparisons, judged.verdicts, strict=True)
        )
        write_jsonl(attempt.out / JUDGEMENTS_FILE, rows)
        judged_samples = list(zip(asked, judged.verdicts, strict=True))
        if is_judged:
            measured = by_prompt((s["index"], v.value) for s, v in judged_samples)
            several = sampling_error(list(measured.values())) if inputs.prompts.num_turns == 1 else {}
    # Averaged by prompt, so that its pairs or samples are in one split and count as one observation.
    quality = {prompt: math.fsum(values) / len(values) for prompt, values in measured.items()}
    columns = {"prompts": list(quality), "values": list(quality.values())}
    columns["selection"] = [prompt in selection for prompt in quality]
    write_json(attempt.out / QUALITY_FILE, {"schema": RESULT_SCHEMA, **columns})
    aligned = read_json(upstream["align"] / STAGE_FILE)["inputs"]
    result = {
        "schema": RESULT_SCHEMA,
        "point": {
            "setup": inputs.setup,
            "method": aligned["method"],
            "kind": METHODS[aligned["method"]].kind,
            "init": inputs.init,
            "beta": aligned["beta"],
            "lr": aligned["trainer"]["lr"],
            "seed": aligned["seed"],
        },
        "quality": {"metric": inputs.metric, **mean_and_error(list(quality.values())), **several},
        "splits": {
            "selection": mean_and_error([v for i, v in quality.items() if i in selection]),
            "reporting": mean_and_error([v for i, v in quality.items() if i not in selection]),
        },
        "judge": usage,
        "kl": kl_estimates(samples),
        "reward_accuracy": mean_and_error([line["correct"] for line in pairs]),
        "reward_margin": mean_and_error([line["margin"] for line in pairs]),
        "response_tokens": response_tokens(samples),
        "finished": sum(s["finished"] for s in samples) / len(samples),
        "dropped": read_json(upstream["align"] / "data.json")["dropped"],
        "stages": _stages(upstream, attempt),
    }
    demonstrations = list(read_jsonl(upstream["sft"] / validation.FILE)) if "sft" in upstream else []
    if demonstrations:
        result["sft_validation_loss"] = _token_loss(demonstrations)
    if "capability" in upstream:
        tasks = capability.beside_sft(upstream["capability"], upstream["sft_capability"])
        write_json(attempt.out / CAPABILITY_FILE, {"schema": RESULT_SCHEMA, "tasks": tasks})
        result["capability"] = _capability_scores(tasks)
    items = pairs
    if is_judged:
        items = [{"prompt": s["index"], "source": s.get("source"), "correct": v.value} for s, v in judged_samples]
    reporting = [item for item in items if item["prompt"] not in selection]
    if sources := _by_source(reporting, pairs, demonstrations):
        result["sources"] = sources
    write_json(attempt.out / RESULT_FILE, result)
    attempt.step(1, 1)


def kl_estimates(samples: list[dict[str, Any]]) -> dict[str, dict[str, float | None]]:
    """Return Monte Carlo estimates of KL(policy || initial model) in nats, per sequence and per token.

    Both kinds are unbiased for samples of the policy at temperature 1. The mean log-ratio, log p(y|x) - log p_0(y|x),
    is "k1" of Schulman, "Approximating KL divergence" (2020). It is negative for some samples, and can be so in the
    mean when a policy barely moved. The Rao-Blackwellized one (`_rb`) has, for each token, the expectation of its
    log-ratio given the prefix: the KL divergence of the two next-token distributions, a sum over the vocabulary. It is
    never negative and mostly varies less (Amini, Vieira and Cotterell, arXiv 2504.10637). Schulman's "k3" is not
    negative either, but at several nats per sequence it varies far more than the log-ratio (docs/mini_tldr.md).

    Per token: the sum of the estimates of all samples over the sum of response lengths. Errors are those over prompts,
    whose samples are one observation.
    """
    prompts = list(by_prompt((sample["index"], sample) for sample in samples).values())
    log_ratios = [math.fsum(s["logp"] - s["reference_logp"] for s in prompt) for prompt in prompts]
    divergences = [math.fsum(s["kl"] for s in prompt) for prompt in prompts]
    counts, lengths = [len(prompt) for prompt in prompts], [sum(s["tokens"] for s in prompt) for prompt in prompts]
    return {
        "per_sequence": ratio_and_error(log_ratios, counts),
        "per_token": ratio_and_error(log_ratios, lengths),
        "per_sequence_rb": ratio_and_error(divergences, counts),
        "per_token_rb": ratio_and_error(divergences, lengths),
    }


def sampling_error(prompts: list[list[float]]) -> dict[str, float]:
    """Return `samples_per_prompt` and `se_samples`; nothing where prompts have one value each.

    se_samples: the standard error of the mean from the samples alone, of these very prompts. The error over prompts
    contains it.
    """
    count = min(map(len, prompts))
    if count < 2:
        return {}
    errors = [mean_and_error(values)["se"] or 0.0 for values in prompts]
    return {"samples_per_prompt": count, "se_samples": math.hypot(*errors) / len(prompts)}


def response_tokens(samples: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean length of a response, with its error over prompts."""
    lengths = list(by_prompt((sample["index"], sample["tokens"]) for sample in samples).values())
    return ratio_and_error([sum(prompt) for prompt in lengths], [len(prompt) for prompt in lengths])


def by_prompt(rows: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    """Return prompt -> what its rows have, in their order. rows: (prompt, what it has)."""
    grouped: dict[int, list[T]] = {}
    for prompt, value in rows:
        grouped.setdefault(prompt, []).append(value)
    return grouped


def selection_prompts(items: list[int], fraction: float, seed: int) -> set[int]:
    """Return the prompts that select hyper-parameters; the others report. The same for every point of a setup."""
    shuffled = sorted(items)
    random.Random(seed).shuffle(shuffled)
    return set(shuffled[: min(len(items) - 1, max(1, round(fraction * len(items))))])


def _by_source(
    reporting: list[dict[str, Any]], pairs: list[dict[str, Any]], demonstrations: list[dict[str, Any]]
) -> dict[str, dict[str, Any]]:
    """Return source -> its measurements: quality on the reporting split, the others over all held-out rows.

    A source is a table of a mixture or a part of a benchmark; without either the result is empty. Rows of a prompt,
    `reporting` and pairs, are one observation, and each counts for the source that it is of.
    """
    table: dict[str, dict[str, Any]] = {}

    def add(name: str, rows: list[dict[str, Any]], measure: Callable[[list[dict[str, Any]]], Any]) -> None:
        for source in dict.fromkeys(row["source"] for row in rows if row.get("source")):
            table.setdefault(source, {})[name] = measure([row for row in rows if row.get("source") == source])

    add("quality", reporting, _mean_of_prompts)
    add("reward_accuracy", pairs, partial(_mean_of_rows, "correct"))
    add("reward_margin", pairs, partial(_mean_of_rows, "margin"))
    add("validation_loss", pairs, partial(_mean_of_rows, "loss"))
    add("sft_validation_loss", demonstrations, _token_loss)
    return table


def _mean_of_prompts(rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean quality of a prompt, each the mean of its rows."""
    values = by_prompt((row["prompt"], row["correct"]) for row in rows).values()
    return mean_and_error([math.fsum(several) / len(several) for several in values])


def _mean_of_rows(name: str, rows: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean of a column over rows, with its standard error over prompts."""
    values = by_prompt((row["prompt"], row[name]) for row in rows).values()
    return ratio_and_error([math.fsum(several) for several in values], [len(several) for several in values])


def _token_loss(demonstrations: list[dict[str, Any]]) -> dict[str, float | None]:
    """Return the mean loss of a supervised token, nats, with its standard error over demonstrations."""
    return ratio_and_error([-row["logp"] for row in demonstrations], [row["tokens"] for row in demonstrations])


def _capability_scores(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
    """Return the score of each task, its change from the SFT model's, paired by document, and the means over tasks."""
    scores = {
        name: {
            "metric": task["metric"],
            **mean_and_error(task["values"]),
            "change": mean_and_error([a - b for a, b in zip(task["values"], task["sft"], strict=True)]),
        }
        for name, task in tasks.items()
    }

    def mean(entries: list[dict[str, Any]]) -> dict[str, float]:
        # Tasks are given, and documents drawn: the error is that of the documents.
        value = math.fsum(entry["value"] for entry in entries) / len(entries)
        return {"value": value, "se": math.hypot(*(entry["se"] for entry in entries)) / len(entries)}

    of_tasks = list(scores.values())
    return {**mean(of_tasks), "change": mean([score["change"] for score in of_tasks]), "tasks": scores}


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Return the mean, its standard error (ddof 1; None for fewer than two values), and n."""
    return ratio_and_error(values, [1] * len(values))


def ratio_and_error(totals: list[float], counts: list[int]) -> dict[str, float | None]:
    """Return the sum of totals over the sum of counts, with its standard error by the delta method over their entries.

    Without a count the ratio is None, and for fewer than two entries its error is.
    """
    n, tokens = len(totals), sum(counts)
    if tokens == 0:
        return {"value": None, "se": None, "n": n}
    ratio = math.fsum(totals) / tokens
    if n < 2:
        return {"value": ratio, "se": None, "n": n}
    residual = math.fsum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True)) / (n - 1)
    return {"value": ratio, "se": math.sqrt(residual / n) / (tokens / n), "n": n}


def _stages(upstream: dict[str, Path], attempt: Attempt) -> list[dict[str, Any]]:
    """Return what DONE records of this stage and of all its upstream: tokens, durations, processes, provenance."""
    this_stage: dict[str, Any] = {"stage": "evaluate", "identity": attempt.identity, "tokens": 0}
    this_stage |= attempt.duration() | provenance(attempt.packages)
    stages: dict[str, dict[str, Any]] = {attempt.identity: this_stage}
    folders = list(upstream.values())
    while folders:
        folder = folders.pop()
        done = read_json(folder / DONE)
        if done["identity"] in stages:
            continue
        stages[done["identity"]] = {key: done.get(key) for key in this_stage}
        for identity in read_json(folder / STAGE_FILE)["upstream"].values():
            folders += (file.parent for file in folder.parents[1].glob(f"*/{identity}/{DONE}"))
    return sorted(stages.values(), key=lambda stage: (stage["stage"], stage["identity"]))
