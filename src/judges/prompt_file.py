"""Loads judge prompts in the formats of their benchmarks: Arena-Hard's of both versions, and MT-Bench's."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from itertools import product
from pathlib import Path
from typing import Any, TypeVar

import yaml

from src.config.placeholders import placeholders
from src.data.evaluation_prompts import BASELINE_MODELS
from src.data.rows import read_rows
from src.errors import ConfigError

T = TypeVar("T")

FIELDS = ("question_1", "answer_1", "answer_2")
FIELDS_V2 = ("QUESTION", "ANSWER_A", "ANSWER_B")
CATEGORIES = tuple(BASELINE_MODELS)  # of Arena-Hard v2


def load_judge_prompt(file: str) -> tuple[str, str]:
    """Return the system prompt, and the template of the question with {question_1}, {answer_1} and {answer_2}.

    Raises ConfigError when the file has another format.
    """

    def read(config: Any) -> tuple[str, str]:
        return _text(config["system_prompt"]), _template(config["prompt_template"][0], FIELDS)

    needs = "system_prompt, and prompt_template, a list whose first entry has {question_1}, {answer_1} and {answer_2}"
    return _load(file, read, needs)


def load_category_prompts(file: str) -> tuple[dict[str, str], str]:
    """Return the system prompt of each category of Arena-Hard v2, and the template of its questions.

    Raises ConfigError when the file has another format.
    """

    def read(config: Any) -> tuple[dict[str, str], str]:
        systems = {category: _text(config["system_prompts"][category]) for category in CATEGORIES}
        return systems, _template(config["prompt_template"], FIELDS_V2)

    needs = (
        f"system_prompts with {' and '.join(CATEGORIES)} (in the benchmark's utils/judge_utils.py), and "
        "prompt_template with {QUESTION}, {ANSWER_A} and {ANSWER_B} (in its arena-hard-v2.0.yaml)"
    )
    return _load(file, read, needs)


def mt_bench_prompt(kind: str, turn: int, has_reference: bool) -> str:
    """Return the name that MT-Bench gives the prompt for a turn; kind: `single` or `pair`."""
    version = "v2" if kind == "pair" and not has_reference else "v1"
    return f"{kind}{'-math' if has_reference else ''}-{version}{'-multi-turn' if turn > 1 else ''}"


def mt_bench_fields(kind: str, turn: int, has_reference: bool) -> tuple[str, ...]:
    """Return the placeholders of that prompt: a first turn has no numbers, but in its reference."""
    answers = ("answer",) if kind == "single" else ("answer_a", "answer_b")
    numbers = [""] if turn == 1 else [f"_{n}" for n in range(1, turn + 1)]
    references = [f"ref_answer_{n}" for n in range(1, turn + 1) if has_reference]
    return (*(f"{name}{number}" for name in ("question", *answers) for number in numbers), *references)


def load_mt_bench_prompts(kind: str, file: str) -> dict[str, tuple[str, str]]:
    """Return the system prompt and the template of the four prompts of a kind, by name.

    Raises ConfigError when the file, JSON lines or a list, lacks one or a placeholder.
    """
    known = {row.get("name"): row for _, row in read_rows(file, "judge.prompt_file")}
    prompts = {}
    for turn, has_reference in product((1, 2), (False, True)):
        name, fields = mt_bench_prompt(kind, turn, has_reference), mt_bench_fields(kind, turn, has_reference)
        try:
            row = known[name]
            prompts[name] = _text(row["system_prompt"]), _template(row["prompt_template"], fields)
        except (LookupError, TypeError, ValueError) as error:
            raise ConfigError(
                f"judge.prompt_file={file}: needs {name} with system_prompt, and prompt_template with "
                f"{', '.join(fields)} in braces, as in MT-Bench's judge_prompts.jsonl ({_reason(error)})"
            ) from None
    return prompts


# judge -> what loads its judge.prompt_file
LOADERS: dict[str, Callable[[str], Any]] = {
    "arena_hard": load_judge_prompt,
    "arena_hard_v2": load_category_prompts,
    "mt_bench": partial(load_mt_bench_prompts, "single"),
    "mt_bench_pairwise": partial(load_mt_bench_prompts, "pair"),
}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _load(file: str, read: Callable[[Any], T], needs: str) -> T:
    try:
        return read(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(f"judge.prompt_file={file}: needs {needs} ({_reason(error)})") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a system prompt or the template is not text")
    value.encode()  # a lone surrogate cannot be sent
    return value


def _template(value: Any, fields: tuple[str, ...]) -> str:
    if missing := [name for name in fields if name not in placeholders(_text(value), fields)]:
        raise ValueError(f"no {missing[0]}")
    return value
