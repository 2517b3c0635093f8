"""Judges behind one seam: (prompt, response, baseline) -> a verdict in [0, 1] and why."""

from __future__ import annotations

from typing import Any, NamedTuple, Protocol

from src.data.rows import Prompt


class Verdict(NamedTuple):
    """1: the response wins, 0: the baseline does, 0.5: a tie."""

    value: float
    reason: str


class Judge(Protocol):
    def __call__(self, prompt: Prompt, response: dict[str, Any], baseline: dict[str, Any]) -> Verdict:
        """response, baseline: rows of samples.jsonl for this prompt."""


def judge_named(name: str) -> Judge:
    from src.judges.gold import gold

    return {"gold": gold}[name]
