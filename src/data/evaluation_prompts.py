"""The prompts that responses are sampled for: held-out ones of the dataset, or a benchmark's file; and answers to them
from a file, such as a baseline's. AlpacaEval's and Arena-Hard's files are read as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from src.data.rows import Prompt, read_rows, text_prompt
from src.data.sources import open_source
from src.data.tables import NO_EXPECTATION, ExpectedRows
from src.errors import ConfigError
from src.planning.identity import PromptInputs

_RESPONSES = ("output", "response", "completion", "answer")


class EvaluationPrompt(NamedTuple):
    identity: str  # what an answer in a file is found by
    prompt: Prompt


def read_prompts(inputs: PromptInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> list[EvaluationPrompt]:
    """Return the first num_prompts prompts, always in the same order.

    Raises ConfigError when the file has fewer, or has one twice.
    """
    wanted = inputs.num_prompts
    if inputs.file is None:
        held_out = open_source(inputs.data, expected_rows).prompts(wanted)
        return [EvaluationPrompt(prompt.text, prompt) for prompt in held_out]
    file = inputs.file.location
    prompts = [_prompt(row, where) for where, row in read_rows(file, "evaluation.prompts_file")]
    if len(prompts) < wanted:
        raise ConfigError(
            f"evaluation.prompts_file={file}: {len(prompts)} prompts and evaluation.num_prompts={wanted}; give at most "
            f"evaluation.num_prompts={len(prompts)}"
        )
    seen: set[str] = set()
    for entry in prompts:
        if entry.identity in seen:
            raise ConfigError(f"evaluation.prompts_file={file}: a prompt is in it twice: {entry.identity[:60]!r}")
        seen.add(entry.identity)
    return prompts[:wanted]


def answers_from(file: str, prompts: Sequence[EvaluationPrompt], key: str) -> list[dict[str, Any]]:
    """Return response and generator for each prompt, in their order. key: the config key that names the file.

    Raises ConfigError naming file and line, or the prompt that has no answer.
    """
    answers = {}
    for where, row in read_rows(file, key):
        answers[_identity(row, where)] = {"response": _answer(row, where), "generator": _generator(row)}
    for prompt in prompts:
        if prompt.identity not in answers:
            raise ConfigError(f"{key}={file}: no answer to {prompt.identity[:60]!r} in it")
    return [answers[prompt.identity] for prompt in prompts]


def _prompt(row: dict[str, Any], where: str) -> EvaluationPrompt:
    turns, text = row.get("turns"), None
    if turns is None:
        text = _identity(row, where)
    elif isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
        text = turns[0].get("content")
    else:
        raise ConfigError(f"{where}: turns must be one user message, with its content")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: a prompt needs text")
    return EvaluationPrompt(_identity(row, where), text_prompt(text))


def _identity(row: dict[str, Any], where: str) -> str:
    for name in ("question_id", "uid", "instruction", "prompt"):
        if isinstance(row.get(name), str | int):
            return str(row[name])
    raise ConfigError(
        f"{where}: needs question_id, instruction or prompt; it has {', '.join(map(repr, row)) or 'none'}"
    )


def _answer(row: dict[str, Any], where: str) -> str:
    found: Any = next((row[name] for name in _RESPONSES if name in row), None)
    if "choices" in row:  # Arena-Hard's
        try:
            found = row["choices"][0]["turns"][0]["content"]
        except (IndexError, KeyError, TypeError):
            found = None
    if not isinstance(found, str):
        raise ConfigError(f"{where}: needs an answer, a text: choices, {', '.join(_RESPONSES)}")
    return found


def _generator(row: dict[str, Any]) -> str:
    return str(row.get("generator") or row.get("model_id") or "baseline")
