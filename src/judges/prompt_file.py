"""Loads a judge prompt in the format of Arena-Hard's judge_config.yaml."""

from __future__ import annotations

from pathlib import Path

import yaml

from src.config.placeholders import placeholders
from src.errors import ConfigError

FIELDS = ("question_1", "answer_1", "answer_2")


def load_judge_prompt(file: str) -> tuple[str, str]:
    """Return the system prompt, and the template of the question with {question_1}, {answer_1} and {answer_2}.

    Raises ConfigError when the file has another format.
    """
    try:
        config = yaml.safe_load(Path(file).read_text(encoding="utf-8"))
        system, template = config["system_prompt"], config["prompt_template"][0]
        if not isinstance(system, str) or not isinstance(template, str):
            raise ValueError("system_prompt or the template is not text")
        if missing := [name for name in FIELDS if name not in placeholders(template, FIELDS)]:
            raise ValueError(f"no {missing[0]}")
        (system + template).encode()  # a lone surrogate cannot be sent
    except (yaml.YAMLError, OSError, LookupError, TypeError, ValueError, RecursionError) as error:
        raise ConfigError(
            f"judge.prompt_file={file}: needs system_prompt, and prompt_template, a list whose first entry has "
            f"{{question_1}}, {{answer_1}} and {{answer_2}} ({type(error).__name__}: {' '.join(str(error).split())})"
        ) from None
    return system, template
