"""Samples and validation scores -> judgements.jsonl, quality.json, and result.json, which compares points."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from src.config.judge_rules import metric_of
from src.errors import StageError
from src.methods import METHODS
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.stages import capability, generate, judge, validation
from src.stages.averages import by_prompt, mean_and_error, ratio_and_error, selection_prompts
from src.store.attempt import Attempt
from src.store.files import read_json, read_jsonl, write_json
from src.store.provenance import provenance
from src.store.store import (
    CAPABILITY_FILE,
    COUNTS_FILE,
    DONE,
    FURTHER_JUDGE,
    QUALITY_FILE,
    RESULT_FILE,
    RESULT_SCHEMA,
    STAGE_FILE,
    VERDICTS_FILE,
)


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
    verdicts: dict[str, dict[str, Any]] = {}  # by judge
    if inputs.judge is not None:
        judgements = judge.judge_samples(inputs, resources, samples, selection, upstream, attempt)
        if judgements is None:
            return
        judgements.write(attempt.out)
        usage, metric = judgements.usage, metric_of(inputs.judge.name)
        verdicts[inputs.judge.name] = {"metric": metric, **judgements.columns}
        judged_samples = list(zip(judgements.samples, judgements.verdicts, strict=True))
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
        "dropped": read_json(upstream["align"] / COUNTS_FILE)["dropped"],
        "stages": _stages(upstream, attempt),
    }
    demonstrations = list(read_jsonl(upstream["sft"] / validation.FILE)) if "sft" in upstream else []
    if demonstrations:
        result["sft_validation_loss"] = _token_loss(demonstrations)
    further = {name: judge.read(folder) for name, folder in upstream.items() if name.startswith(FURTHER_JUDGE)}
    if further:
        result["judges"] = {
            one["name"]: {
                "stage": upstream[role].name,
                **{key: one[key] for key in ("metric", "usage", "quality", "splits")},
            }
            for role, one in further.items()
        }
        for one in further.values():
            verdicts[one["name"]] = {"metric": one["metric"], "further": True, **one["verdicts"]}
    if verdicts:
        sampled = list(dict.fromkeys(sample["index"] for sample in samples))
        selecting = sorted(selection_prompts(sampled, inputs.selection_fraction, inputs.split_seed))
        write_json(attempt.out / VERDICTS_FILE, {"schema": RESULT_SCHEMA, "selection": selecting, "judges": verdicts})
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
