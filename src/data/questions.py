"""What responses are sampled for: the held-out prompts of the point's data, or the questions of a benchmark's file.
And answers to them from a file, such as its baseline's. AlpacaEval's and Arena-Hard's files are read as they are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from src.config import ConfigError, Point
from src.data import source_of
from src.data.rows import Prompt, read_rows, text_prompt
from src.judges import BASELINES

_RESPONSES = ("output", "response", "completion", "answer")


class Question(NamedTuple):
    identity: str  # what an answer in a file is found by
    prompt: Prompt


def questions_of(point: Point) -> list[Question]:
    """The first evaluation.prompts of them, always in the same order. Raises ConfigError for a file that has fewer."""
    wanted, file = point.evaluation.prompts, point.evaluation.questions
    if file is None:
        return [Question(prompt.text, prompt) for prompt in source_of(point).prompts(wanted)]
    questions = [_question(row, where) for where, row in read_rows(file, "evaluation.questions")]
    if len(questions) < wanted:
        raise ConfigError(
            f"evaluation.questions={file}: {len(questions)} questions and evaluation.prompts={wanted}; give at most "
            f"evaluation.prompts={len(questions)}"
        )
    if len({question.identity for question in questions}) < len(questions):
        twice = next(q.identity for i, q in enumerate(questions) if q.identity in {o.identity for o in questions[:i]})
        raise ConfigError(f"evaluation.questions={file}: a question is there twice: {twice[:60]!r}")
    return questions[:wanted]


def answers_from(file: str, questions: Sequence[Question], key: str) -> list[dict[str, Any]]:
    """response and generator of each question, in their order. key: the config key that names the file.
    Raises ConfigError naming file and line, or the question that has no answer."""
    answers = {}
    for where, row in read_rows(file, key):
        answers[_identity(row, where)] = {"response": _answer(row, where), "generator": _generator(row)}
    for question in questions:
        if question.identity not in answers:
            raise ConfigError(f"{key}={file}: no answer to {question.identity[:60]!r} in it")
    return [answers[question.identity] for question in questions]


def check_readable(points: Sequence[Point]) -> None:
    """Read every row of the files the points name, before anything runs. Raises ConfigError naming file and line."""
    for point in {repr(p.dataset): p for p in points}.values():
        source_of(point).check()
    for point in {repr((p.dataset, p.evaluation, p.judge)): p for p in points}.values():
        baseline = None if point.judge.name == "none" or point.judge.baseline in BASELINES else point.judge.baseline
        # Prompts of the hub are not fetched here: a plan needs no network.
        if point.evaluation.questions is not None or (baseline is not None and point.dataset.source != "hub"):
            questions = questions_of(point)
            if baseline is not None:
                answers_from(baseline, questions, "judge.baseline")


def _question(row: dict[str, Any], where: str) -> Question:
    turns, text = row.get("turns"), None
    if turns is None:
        text = _identity(row, where)
    elif isinstance(turns, list) and len(turns) == 1 and isinstance(turns[0], dict):
        text = turns[0].get("content")
    else:
        raise ConfigError(f"{where}: turns must be one user message, with its content")
    if not isinstance(text, str) or not text.strip():
        raise ConfigError(f"{where}: a question needs text")
    return Question(_identity(row, where), text_prompt(text))


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
