"""Samples and validation scores -> judgements.jsonl, quality.json, and result.json, which compares points."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

from src.config.judge_rules import metric_of
from src.errors import StageError
from src.methods import METHODS
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.stages import capability, generate, judge
from src.stages.averages import selection_prompts
from src.stages.measurements import MeasuredRows, capability_scores, measure
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
    VALIDATION_FILE,
    VERDICTS_FILE,
)


def run(inputs: EvaluateInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    attempt.step(0, 1)
    samples = generate.read(upstream["samples"])
    pairs = list(read_jsonl(upstream["align"] / VALIDATION_FILE))
    demonstrations = list(read_jsonl(upstream["sft"] / VALIDATION_FILE)) if "sft" in upstream else []
    rows = MeasuredRows(samples, pairs, demonstrations)
    prompts, selection = rows.split(inputs.metric, inputs.selection_fraction, inputs.split_seed)
    if len(prompts) < 2:
        raise StageError(
            f"evaluation: {len(prompts)} prompt to compare points by; selection and reporting need one each, at least 2"
        )
    usage = None
    verdicts: dict[str, dict[str, Any]] = {}  # by judge
    if inputs.judge is not None:
        judgements = judge.judge_samples(inputs, resources, samples, selection, upstream, attempt)
        if judgements is None:
            return
        judgements.write(attempt.out)
        usage, metric = judgements.usage, metric_of(inputs.judge.name)
        verdicts[inputs.judge.name] = {"metric": metric, **judgements.columns}
        rows = replace(rows, judged=list(zip(judgements.samples, judgements.columns["value"], strict=True)))
    quality, measured = measure(rows, inputs.metric, selection, inputs.prompts.num_turns)
    write_json(attempt.out / QUALITY_FILE, quality)
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
        **measured,
        "judge": usage,
        "dropped": read_json(upstream["align"] / COUNTS_FILE)["dropped"],
        "stages": _stages(upstream, attempt),
    }
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
        result["capability"] = capability_scores(tasks)
    write_json(attempt.out / RESULT_FILE, result)
    attempt.step(1, 1)


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
