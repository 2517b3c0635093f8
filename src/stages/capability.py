"""What a checkpoint can do, by tasks of lm-eval -> documents.jsonl and scores.json."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import numpy as np

from src.data.lm_eval_tasks import load_task, task_manager
from src.errors import StageError
from src.model.loading import load_template
from src.planning.content import reading
from src.planning.identity import CapabilityInputs, TaskInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt
from src.store.files import read_json, read_jsonl, write_json, write_jsonl

DOCUMENTS_FILE, SCORES_FILE = "documents.jsonl", "scores.json"
SEED = 1234  # of the examples in prompts; lm-eval's own


def read(folder: Path) -> dict[str, dict[str, Any]]:
    """Return task -> its `metric`, and `values`: document -> score by that metric, in the order of the documents."""
    tasks: dict[str, dict[str, Any]] = read_json(folder / SCORES_FILE)["tasks"]
    for task in tasks.values():
        task["values"] = {}
    for row in read_jsonl(folder / DOCUMENTS_FILE):
        task = tasks[row["task"]]
        task["values"][f"{row['subtask']}/{row['document']}"] = row["scores"][task["metric"]]
    return tasks


def beside_sft(policy: Path, sft: Path) -> dict[str, dict[str, Any]]:
    """Return task -> its `metric`, its `documents`, and for each of them its score, in `values`, and the SFT model's.

    Raises StageError when the two were not asked the same.
    """
    tasks = {}
    other = read(sft)
    for name, task in read(policy).items():
        values, of_sft = task["values"], other[name]["values"]
        if values.keys() != of_sft.keys() or task["versions"] != other[name]["versions"]:
            raise StageError(
                f"{name}: the SFT model was asked other documents, as its data on the hub has changed since; "
                f"delete {sft} and {policy}, and run the same command again"
            )
        scores = {"values": list(values.values()), "sft": [of_sft[document] for document in values]}
        tasks[name] = {"metric": task["metric"], "documents": list(values), **scores}
    return tasks


def run(inputs: CapabilityInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    from lm_eval.evaluator import evaluate

    from src.stages.lm_eval_model import shared_model

    template = load_template(inputs.model)
    folder = None if inputs.files is None else inputs.files.location
    manager = task_manager([task.name for task in inputs.tasks], folder)
    rows: list[dict[str, Any]] = []
    described: dict[str, dict[str, Any]] = {}
    with shared_model(inputs, resources, upstream, template, attempt) as model:
        attempt.step(0, len(inputs.tasks))
        for number, task in enumerate(inputs.tasks):
            with reading(inputs.files):
                subtasks = load_task(manager, task.name, folder, task.num_fewshot, SEED)
            documents = _drawn(task.name, subtasks, inputs)
            model.task = task.name
            random.seed(0)  # as lm-eval's command line, for tasks whose code draws
            np.random.seed(SEED)
            results = evaluate(
                model,
                {"tasks": {name: subtasks[name] for name in documents}},
                samples=documents,
                bootstrap_iters=0,
                apply_chat_template=inputs.chat_template,
                fewshot_as_multiturn=inputs.chat_template,
            )
            scored = [row for name in documents for row in _rows(task.name, name, results["samples"][name])]
            described[task.name] = {
                "metric": _metric(task, scored, subtasks),
                "num_fewshot": sorted({subtask.get_config("num_fewshot") for subtask in subtasks.values()}),
                "versions": {name: results["versions"].get(name) for name in documents},
            }
            rows += scored
            attempt.step(number + 1, len(inputs.tasks))
    if attempt.is_main_process:
        write_jsonl(attempt.out / DOCUMENTS_FILE, rows)
        write_json(attempt.out / SCORES_FILE, {"tasks": described})


def _drawn(name: str, subtasks: dict[str, Any], inputs: CapabilityInputs) -> dict[str, list[int]]:
    """Return subtask -> the documents that are asked of it: all, or those drawn from all subtasks together."""
    pool = [(subtask, number) for subtask, task in subtasks.items() for number in range(len(task.eval_docs))]
    if inputs.limit is not None and inputs.limit < len(pool):
        pool = sorted(random.Random(f"{inputs.seed}/{name}").sample(pool, inputs.limit))
    documents: dict[str, list[int]] = {}
    for subtask, number in pool:
        documents.setdefault(subtask, []).append(number)
    return documents


def _rows(task: str, subtask: str, samples: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return a row for each document, with its score by every metric that is one number; METRIC,FILTER -> score."""
    rows: dict[int, dict[str, Any]] = {}
    for sample in samples:
        first = {"task": task, "subtask": subtask, "document": sample["doc_id"], "scores": {}}
        row = rows.setdefault(sample["doc_id"], first)
        for metric in sample["metrics"]:
            if isinstance(value := sample[metric], bool | int | float | np.number | np.bool_):
                row["scores"][f"{metric},{sample['filter']}"] = float(value)
        if isinstance(answer := sample["resps"][0][0], str):
            row["answer"] = answer
    return list(rows.values())


def _metric(task: TaskInputs, rows: list[dict[str, Any]], subtasks: dict[str, Any]) -> str:
    """Return the metric, with its filter, that points are compared by. Raises StageError when there is none such."""
    known = dict.fromkeys(name for row in rows for name in row["scores"])
    less_is_better = {n for subtask in subtasks.values() for n, more in subtask.higher_is_better().items() if not more}
    usable = [
        name
        for name in known
        if name.partition(",")[0] not in less_is_better and all(name in row["scores"] for row in rows)
    ]
    wanted = [name for name in usable if task.metric in (None, name, name.partition(",")[0])]
    if not wanted:
        raise StageError(
            f"capability.metrics.{task.name}={task.metric or 'null'}: every document needs one number of which more is "
            f"better; the task has {', '.join(usable) or 'none'}"
        )
    return wanted[0]
