"""The interface of judges: comparisons of a response with a baseline -> verdicts in [0, 1], each with a reason.

Some also grade a response by itself: a number, by which on-policy pairs are made.

docs/add-a-judge.md adds one.
"""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

from src.data.rows import Prompt
from src.planning.identity import EvaluateInputs, JudgeInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt


class Comparison(NamedTuple):
    """A prompt with two responses to it, each a dict with at least `response` (text) and `finished`.

    A sampled one is a row of samples.jsonl (index, prompt, tokens, logp, ...); one from a file has its `generator`. The
    baseline is empty for a judge of a response by itself, whose verdict is whether it is right.
    """

    prompt: Prompt
    response: dict[str, Any]
    baseline: dict[str, Any]

    @property
    def texts(self) -> tuple[str, str, str]:
        """Prompt, response and baseline."""
        return self.prompt.text, self.response["response"], self.baseline["response"]


class Response(NamedTuple):
    """A response that is graded by itself; finished: whether its end token was sampled."""

    prompt: Prompt
    text: str
    finished: bool


class Verdict(NamedTuple):
    """value: 1 if the response wins or is right, 0 if the baseline wins or it is wrong, 0.5 for a tie; or a rating.

    first: for each question that showed both answers, 1 if the one shown first was preferred, 0 if the other was, 0.5
    for a tie; empty where the judge knows no order, or does not say which it was.
    """

    value: float
    reason: str
    first: tuple[float, ...] = ()


@dataclass
class Judged:
    """Verdicts in the order of the comparisons.

    usage: what they took (answers, calls, tokens, dollars, unparsable answers), which models answered, and when.
    scores: the score of a benchmark by its own rules: name -> value, with se or with low and high. In percent, but for
    names that end with `rating`.
    """

    verdicts: list[Verdict]
    usage: dict[str, Any] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


class JudgeFunction(Protocol):
    def __call__(
        self, inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
    ) -> Judged:
        """Judge all comparisons of an evaluation.

        A slow judge reports progress with attempt.step and keeps its answers (`src.judges.answers`), so that a rerun
        resumes. Raises StageError when it cannot continue.
        """


class GradingFunction(Protocol):
    def __call__(
        self, judge: JudgeInputs, resources: Resources, responses: Sequence[Response], attempt: Attempt
    ) -> list[float]:
        """Return the grade of every response, in their order: the higher the better, equal where neither is.

        A slow judge reports progress and keeps its answers as `JudgeFunction` says; those of a judge in MODEL_JUDGES
        are computed by all ranks.
        """


def grading_function(name: str) -> GradingFunction:
    """Return the function `grades` of src/judges/NAME.py, which the judges in GRADING_JUDGES have."""
    return importlib.import_module(f"src.judges.{name}").grades


def judge_function(name: str) -> JudgeFunction:
    """Return the function NAME of src/judges/NAME.py, imported only now: a judge may need an optional package."""
    return getattr(importlib.import_module(f"src.judges.{name}"), name)
