"""Write the data of +sweep=smollm2_study: `python -m benchmarks.smollm2_study.prepare ROWS FOLDER`.

ROWS is a file of Anthropic/hh-rlhf (Bai et al. 2022), such as harmless-base/train.jsonl.gz. The shortest of its rows
are taken, so that a laptop trains a point in minutes: NUM_TRAIN pairs to train on and NUM_HELD_OUT with other prompts.
They are written in the layout that dataset=hh_rlhf reads with dataset.path=FOLDER/rows. FOLDER/tasks is for
capability.task_files: the task mmlu_dev, the worked examples of MMLU (Hendrycks et al. 2021) that the package lm-eval
brings, five for each of its subjects, as questions with four answers to choose from.
"""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml

from src.data.adapters import ADAPTERS
from src.errors import ConfigError, report_errors
from src.store.files import atomic_write
from sweeps.arguments import ArgumentParser

NUM_TRAIN, NUM_HELD_OUT = 320, 200  # 40 steps of 8 pairs
SEED = 0  # of which of the shortest rows are held out
_ANSWERS = re.compile(r"(.*?)\s*\(A\) (.*?) ?\(B\) (.*?) ?\(C\) (.*?) ?\(D\) (.*)", re.DOTALL)
_RIGHT = re.compile(r"The answer is \(([ABCD])\)")
MMLU_DEV = {
    "task": "mmlu_dev",
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": "mmlu_dev.jsonl"}},
    "test_split": "test",
    "output_type": "multiple_choice",
    "doc_to_text": "{{question}}\nA. {{choices[0]}}\nB. {{choices[1]}}\nC. {{choices[2]}}\nD. {{choices[3]}}\nAnswer:",
    "doc_to_choice": ["A", "B", "C", "D"],
    "doc_to_target": "answer",
    "metric_list": [{"metric": "acc", "aggregation": "mean", "higher_is_better": True}],
    "metadata": {"version": 1.0},
}


def read_pairs(path: Path) -> list[dict[str, str]]:
    """Return the rows whose two transcripts differ in the last answer alone, the first of each prompt."""
    rows: dict[str, dict[str, str]] = {}
    opener = gzip.open if path.suffix == ".gz" else open
    try:
        with opener(path, "rt", encoding="utf-8") as file:
            for number, line in enumerate(file, 1):
                row, pair = _parse(line, f"{path}:{number}")
                (*chosen, last), (*rejected, other) = pair["chosen"], pair["rejected"]
                if chosen == rejected and last["content"].strip() and other["content"].strip() and last != other:
                    rows.setdefault(json.dumps(chosen), row)
    except (OSError, EOFError, zlib.error, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read ({getattr(error, 'strerror', None) or error})") from None
    return list(rows.values())


def _parse(line: str, where: str) -> tuple[dict[str, str], dict[str, Any]]:
    """Return the two transcripts of a row, and their messages. Raises ConfigError naming `where`."""
    try:
        row = {name: json.loads(line)[name] for name in ("chosen", "rejected")}
        return row, ADAPTERS["hh"](row)
    except (ValueError, LookupError, TypeError, ConfigError) as error:
        raise ConfigError(f"{where}: no row of Anthropic/hh-rlhf ({error})") from None


def split_pairs(rows: list[dict[str, str]]) -> tuple[list[dict[str, str]], list[dict[str, str]]]:
    """Return the training pairs and the held-out ones, both of the shortest rows in a seeded order."""
    count = NUM_TRAIN + NUM_HELD_OUT
    if len(rows) < count:
        raise ConfigError(f"{len(rows)} prompts with a pair of answers; the study needs {count}")
    shortest = sorted(rows, key=lambda row: len(row["chosen"]) + len(row["rejected"]))[:count]
    random.Random(SEED).shuffle(shortest)
    return shortest[:NUM_TRAIN], shortest[NUM_TRAIN:]


def worked_examples() -> Iterator[dict[str, Any]]:
    """Yield `question`, `choices` and `answer` (0 to 3) of the worked examples of MMLU that lm-eval brings."""
    spec = importlib.util.find_spec("lm_eval")
    if spec is None or spec.origin is None:
        raise ConfigError("the package lm-eval is missing: pip install '.[capability]'")
    for file in sorted(Path(spec.origin).parent.glob("tasks/mmlu/flan_cot_fewshot/mmlu_*.yaml")):
        for sample in yaml.safe_load(file.read_text(encoding="utf-8"))["fewshot_config"]["samples"]:
            parts, right = _ANSWERS.fullmatch(sample["question"].strip()), _RIGHT.search(sample["target"])
            if parts and right:
                question, *choices = (" ".join(part.split()) for part in parts.groups())
                yield {"question": question, "choices": choices, "answer": "ABCD".index(right[1])}


def main() -> int:
    parser = ArgumentParser(prog="python -m benchmarks.smollm2_study.prepare", description=__doc__)
    parser.add_argument("rows", type=Path, help="a file of Anthropic/hh-rlhf, JSON lines, also compressed by gzip")
    parser.add_argument("folder", type=Path, help="where to write; files that are there are replaced")
    arguments = parser.parse_args()
    with report_errors():
        train, held_out = split_pairs(read_pairs(arguments.rows))
        questions = list(worked_examples())
        files = {
            "rows/sft/train.jsonl": train,
            "rows/preference/train.jsonl": train,
            "rows/preference/test.jsonl": held_out,
            "tasks/mmlu_dev.jsonl": questions,
        }
        for name, rows in files.items():
            _write(arguments.folder / name, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
        _write(arguments.folder / "tasks" / "mmlu_dev.yaml", yaml.safe_dump(MMLU_DEV, sort_keys=False))
        print(f"{arguments.folder}: {len(train)} training pairs, {len(held_out)} held out, {len(questions)} questions")
    return 0


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    atomic_write(path, text)


if __name__ == "__main__":
    sys.exit(main())
