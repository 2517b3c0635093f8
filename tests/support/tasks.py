"""Two tasks of lm-eval in a folder of their own: 40 questions with four answers to choose from, and six to complete."""

from __future__ import annotations

import json
import random
from pathlib import Path

import yaml

NUM_QUESTIONS = 40


def write_tasks(folder: Path) -> Path:
    """Write tasks `sums`, of NUM_QUESTIONS, and `echo`, of six, with their data; return the folder."""
    folder.mkdir(parents=True)
    rng, questions = random.Random(0), []
    for _ in range(NUM_QUESTIONS):
        a, b = rng.randrange(1, 5), rng.randrange(1, 5)
        letters = rng.sample("ABCD", 4)
        listed = ", ".join(f"{letter}: {a + b + wrong}" for wrong, letter in enumerate(letters))
        questions.append({"question": f"What is {a} plus {b}? {listed}.", "answer": "ABCD".index(letters[0])})
    _write_data(folder / "sums.jsonl", questions)
    _write_data(folder / "echo.jsonl", [{"question": f"The post is {n}", "answer": "the"} for n in range(6)])
    multiple_choice = {
        "output_type": "multiple_choice",
        "doc_to_text": "{{question}} Answer with a letter.",
        "doc_to_choice": ["A", "B", "C", "D"],
        "metric_list": [_metric("acc"), _metric("acc_norm")],
    }
    generation = {
        "output_type": "generate_until",
        "doc_to_text": "{{question}}",
        "generation_kwargs": {"until": ["\n"], "max_gen_toks": 4},
        "metric_list": [_metric("exact_match")],
    }
    for name, task in (("sums", multiple_choice), ("echo", generation)):
        data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": f"{name}.jsonl"}}}
        common = {
            "task": name,
            **data,
            "test_split": "test",
            "doc_to_target": "{{answer}}",
            "metadata": {"version": 1.0},
        }
        if name == "sums":
            common["doc_to_target"] = "answer"
        (folder / f"{name}.yaml").write_text(yaml.safe_dump(common | task))
    return folder


def _metric(name: str) -> dict[str, object]:
    return {"metric": name, "aggregation": "mean", "higher_is_better": True}


def _write_data(path: Path, rows: list[dict[str, object]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def asking(folder: Path, *names: str) -> list[str]:
    """Return the overrides that ask tasks of a folder."""
    return ["capability=subset", f"capability.tasks=[{','.join(names)}]", f"capability.task_files={folder}"]
