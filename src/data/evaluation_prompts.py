"""The prompts that responses are sampled for, and a baseline's answers to them from a file.

Prompts are held-out ones of the dataset, or a benchmark's: the files of AlpacaEval, Arena-Hard, GSM8K, MATH and AIME
are read unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any, NamedTuple

from src.data.boxes import last_box
from src.data.rows import NO_EXPECTATION, ExpectedRows, Prompt, list_columns, read_rows, text_prompt
from src.data.sources import open_source
from src.errors import ConfigError
from src.planning.content import reading
from src.planning.identity import PromptInputs

# The text of a prompt: AlpacaEval has instruction, GSM8K question, MATH problem, AIME Problem.
_TEXT_FIELDS = ("instruction", "prompt", "question", "problem", "Problem")
_KEY_FIELDS = ("question_id", "uid", *_TEXT_FIELDS)  # what an answer is matched with its prompt by
# The part of a benchmark that a prompt is of: AlpacaEval has dataset, MATH500 subject.
_SOURCE_FIELDS = ("source", "dataset", "subject")
_RESPONSE_FIELDS = ("output", "response", "completion", "answer")


class EvaluationPrompt(NamedTuple):
    key: str  # by which an answer in a file is matched with its prompt
    prompt: Prompt


def read_prompts(inputs: PromptInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> list[EvaluationPrompt]:
    """Return the first num_prompts prompts, always in the same order.

    Raises ConfigError when the file has fewer, or has one twice.
    """
    if inputs.file is None:
        held_out = open_source(inputs.data, expected_rows).prompts(inputs.num_prompts)
        return [EvaluationPrompt(prompt.text, prompt) for prompt in held_out]
    file = inputs.file.location
    with reading(inputs.file):
        prompts = [_prompt(row, where) for where, row in read_rows(file, "evaluation.prompts_file")]
    if len(prompts) < inputs.num_prompts:
        raise ConfigError(
            f"evaluation.prompts_file={file}: {len(prompts)} prompts and evaluation.num_prompts={inputs.num_prompts}; "
            f"give at most evaluation.num_prompts={len(prompts)}"
        )
    counts = Counter(entry.key for entry in prompts)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise ConfigError(f"evaluation.prompts_file={file}: a prompt occurs twice: {repeated[0][:60]!r}")
    return prompts[: inputs.num_prompts]


def read_answers(file: str, prompts: Sequence[EvaluationPrompt], key: str) -> list[dict[str, Any]]:
    """Return response and generator for each prompt, in their order. key: the config key that names the file.

    Raises ConfigError naming file and line, or the prompt that has no answer.
    """
    answers: dict[str, dict[str, Any]] = {}
    for where, row in read_rows(file, key):
        generator = str(row.get("generator") or row.get("model_id") or "baseline")
        answer = {"response": _answer(row, where), "generator": generator}
        if answers.setdefault(_key(row, where), answer) != answer:
            raise ConfigError(f"{where}: a second, other answer to {_key(row, where)[:60]!r}; give one for each prompt")
    for prompt in prompts:
        if prompt.key not in answers:
            raise ConfigError(f"{key}={file}: no answer to {prompt.key[:60]!r}")
    return [answers[prompt.key] for prompt in prompts]


def _prompt(row: dict[str, Any], where: str) -> EvaluationPrompt:
    if row.get("turns") is None:
        text: Any = next((row[name] for name in _TEXT_FIELDS if row.get(name) is not None), None)
        if text is None:
            raise ConfigError(f"{where}: needs {_listed(('turns', *_TEXT_FIELDS))}; it has {list_columns(row)}")
    else:
        try:
            (turn,) = row["turns"]
            text = turn["content"]
        except (LookupError, TypeError, ValueError):
            raise ConfigError(f"{where}: turns must be one user message, with its content") from None
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: a prompt needs text")
    answer = _expected_answer(row)
    prompt = text_prompt(text, None if answer is None else {"answer": answer})
    source = next((row[name] for name in _SOURCE_FIELDS if isinstance(row.get(name), str)), "")
    return EvaluationPrompt(_key(row, where), replace(prompt, source=source))


def _expected_answer(row: dict[str, Any]) -> str | None:
    """Return the answer of a problem: after GSM8K's #### where there is one; that of MATH is in its solution's box."""
    answer = next((row[name] for name in ("answer", "Answer") if isinstance(row.get(name), str | int | float)), None)
    if answer is not None:
        return str(answer).rpartition("####")[2].strip() or None
    solution = row.get("solution")
    return (last_box(solution) or None) if isinstance(solution, str) else None


def _key(row: dict[str, Any], where: str) -> str:
    for name in _KEY_FIELDS:
        if isinstance(row.get(name), str | int):
            return str(row[name])
    raise ConfigError(f"{where}: needs {_listed(_KEY_FIELDS)}; it has {list_columns(row)}")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _answer(row: dict[str, Any], where: str) -> str:
    text: Any = next((row[name] for name in _RESPONSE_FIELDS if name in row), None)
    if "choices" in row:  # Arena-Hard's layout
        text = None
        with suppress(IndexError, KeyError, TypeError):
            text = row["choices"][0]["turns"][0]["content"]
    if not isinstance(text, str):
        raise ConfigError(f"{where}: needs the text of an answer in one of choices, {', '.join(_RESPONSE_FIELDS)}")
    return text
