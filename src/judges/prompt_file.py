"""Loads judge prompts in the formats of the benchmarks: Arena-Hard v0.1's judge_config.yaml, and v2's yaml."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import yaml

from src.config.placeholders import placeholders
from src.errors import ConfigError

T = TypeVar("T")

FIELDS = ("question_1", "answer_1", "answer_2")
FIELDS_V2 = ("QUESTION", "ANSWER_A", "ANSWER_B")
CATEGORIES = ("hard_prompt", "creative_writing")  # of Arena-Hard v2


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


# judge -> what loads its judge.prompt_file
LOADERS: dict[str, Callable[[str], Any]] = {"arena_hard": load_judge_prompt, "arena_hard_v2": load_category_prompts}


def _load(file: str, read: Callable[[Any], T], needs: str) -> T:
    try:
        return read(yaml.safe_load(Path(file).read_text(encoding="utf-8")))
    except (yaml.YAMLError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ConfigError(f"judge.prompt_file={file}: needs {needs} ({reason})") from None


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise ValueError("a system prompt or the template is not text")
    value.encode()  # a lone surrogate cannot be sent
    return value


def _template(value: Any, fields: tuple[str, ...]) -> str:
    if missing := [name for name in fields if name not in placeholders(_text(value), fields)]:
        raise ValueError(f"no {missing[0]}")
    return value
