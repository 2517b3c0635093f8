"""Judges behind one seam: comparisons of a response with a baseline -> verdicts in [0, 1], each with its reason."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from src.data.rows import Prompt
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources

if TYPE_CHECKING:
    from src.store.attempt import Attempt


class Comparison(NamedTuple):
    """response, baseline: rows of samples.jsonl for this prompt; a baseline that was not sampled has no log-probs, one
    from a file its generator."""

    prompt: Prompt
    response: dict[str, Any]
    baseline: dict[str, Any]


class Verdict(NamedTuple):
    """1: the response wins, 0: the baseline does, 0.5: a tie."""

    value: float
    reason: str


@dataclass
class Judged:
    """One verdict a comparison, in their order; what they took (calls, tokens, dollars, unparsable answers); and what a
    benchmark makes of them by its own rules, percent: value, with se or with low and high."""

    verdicts: list[Verdict]
    usage: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


class JudgeFunction(Protocol):
    def __call__(
        self, inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
    ) -> Judged:
        """Says how far it is through attempt.step. Raises StageError when it cannot go on; what it has is kept."""


def judge_function(name: str) -> JudgeFunction:
    return getattr(importlib.import_module(f"src.judges.{name}"), name)
