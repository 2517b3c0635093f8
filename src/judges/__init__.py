"""Judges behind one seam: comparisons of a response with a baseline -> verdicts in [0, 1], each with its reason."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from src.config import Judge, Point
from src.data.rows import Prompt
from src.identity import fingerprint

if TYPE_CHECKING:
    from src.store import Attempt

# NAME: the fields of its config that verdicts depend on; src/judges/NAME.py has the function NAME.
JUDGES: dict[str, tuple[str, ...]] = {
    "gold": (),
    "tldr": ("model", "temperature", "max_tokens"),
    "alpaca_eval": ("model",),
    "arena_hard": ("model", "temperature", "max_tokens", "prompt"),
    "reward_model": ("model",),
}

# What a response is compared with, where it is not the answers in a file.
BASELINES = ("sft", "chosen")

# Those that ask an endpoint, OpenAI's unless judge.base_url says another.
REMOTE = ("tldr", "alpaca_eval", "arena_hard")

# Those whose model is one, or a description of one, that may lie on this machine: its content counts, not its place.
_LOCAL = ("alpaca_eval", "reward_model")


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
    account: dict[str, float] = field(default_factory=dict)
    scores: dict[str, dict[str, float]] = field(default_factory=dict)


class JudgeFunction(Protocol):
    def __call__(self, point: Point, comparisons: Sequence[Comparison], attempt: Attempt) -> Judged:
        """Says how far it is through attempt.step. Raises StageError when it cannot go on; what it has is kept."""


def judge_named(name: str) -> JudgeFunction:
    return getattr(importlib.import_module(f"src.judges.{name}"), name)


def identity_fields(judge: Judge) -> dict[str, Any] | None:
    """What verdicts depend on; None without a judge. Raises ConfigError when a local file of it is not there."""
    if judge.name == "none":
        return None
    fields = {name: getattr(judge, name) for name in JUDGES[judge.name]}
    if judge.name in _LOCAL:
        assert judge.model is not None
        fields["model"] = fingerprint(judge.model, key="judge.model")
    if fields.get("prompt") is not None:
        fields["prompt"] = fingerprint(fields["prompt"], key="judge.prompt")
    assert judge.baseline is not None
    baseline = judge.baseline if judge.baseline in BASELINES else fingerprint(judge.baseline, key="judge.baseline")
    return {"name": judge.name, "baseline": baseline, **fields}
