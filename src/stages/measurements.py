"""What an evaluation measures, from rows that are on disk: quality.json, and the numbers of result.json. No torch.

Whoever has the rows of a finished stage can compute its result again (`sweeps.study.recompute`).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Set
from dataclasses import dataclass, field
from functools import partial
from typing import Any

from src.stages.averages import by_prompt, mean_and_error, ratio_and_error, selection_prompts
from src.store.store import RESULT_SCHEMA

BY_PAIRS = "reward_accuracy"  # the metric that no samples are judged for


@dataclass(frozen=True)
class MeasuredRows:
    """Rows of samples.jsonl, of validation.jsonl of alignment and SFT, and of those samples that have a verdict it."""

    samples: list[dict[str, Any]]
    pairs: list[dict[str, Any]]
    demonstrations: list[dict[str, Any]] = field(default_factory=list)
    judged: list[tuple[dict[str, Any], float]] = field(default_factory=list)

    def split(self, metric: str, fraction: float, seed: int) -> tuple[list[int], set[int]]:
        """Return the prompts that points are compared by, and those of them that select hyper-parameters."""
        column, rows = ("prompt", self.pairs) if metric == BY_PAIRS else ("index", self.samples)
        prompts = list(dict.fromkeys(row[column] for row in rows))
        return prompts, selection_prompts(prompts, fraction, seed)


def measure(
    rows: MeasuredRows, metric: str, selection: set[int], num_turns: int = 1
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the content of quality.json, and what of result.json is measured on the rows.

    selection: of MeasuredRows.split. num_turns: the most answers to one prompt, each to all that came before.
    """
    if is_judged := metric != BY_PAIRS:
        measured = by_prompt((sample["index"], value) for sample, value in rows.judged)
    else:
        measured = by_prompt((line["prompt"], line["correct"]) for line in rows.pairs)
    several = sampling_error(list(measured.values())) if is_judged and num_turns == 1 else {}
    # Averaged by prompt, so that its pairs or samples are in one split and count as one observation.
    quality = {prompt: math.fsum(values) / len(values) for prompt, values in measured.items()}
    columns = {"prompts": list(quality), "values": list(quality.values())}
    columns["selection"] = [prompt in selection for prompt in quality]
    result: dict[str, Any] = {
        "quality": {"metric": metric, **mean_and_error(list(quality.values())), **several},
        "splits": of_splits(quality, selection),
        "kl": kl_estimates(rows.samples),
        "reward_accuracy": mean_and_error([line["correct"] for line in rows.pairs]),
        "reward_margin": mean_and_error([line["margin"] for line in rows.pairs]),
        "response_tokens": response_tokens(rows.samples),
        "finished": sum(s["finished"] for s in rows.samples) / len(rows.samples),
    }
    if rows.demonstrations:
        result["sft_validation_loss"] = _token_loss(rows.demonstrations)
    items = rows.pairs
    if is_judged:
        items = [{"prompt": s["index"], "source": s.get("source"), "correct": value} for s, value in rows.judged]
    reporting = [item for item in items if item["prompt"] not in selection]
    if sources := _by_source(reporting, rows.pairs, rows.demonstrations):
        result["sources"] = sources
    return {"schema": RESULT_SCHEMA, **columns}, result


def of_splits(quality: Mapping[int, float], selection: Set[int]) -> dict[str, dict[str, float | None]]:
    """Return the mean quality of each split of the prompts. quality: by prompt. selection: prompts that select."""
    return {
        "selection": mean_and_error([v for i, v in quality.items() if i in selection]),
        "reporting": mean_and_error([v for i, v in quality.items() if i not in selection]),
    }


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


def capability_scores(tasks: dict[str, dict[str, Any]]) -> dict[str, Any]:
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
