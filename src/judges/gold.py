"""The gold judge of mini TL;DR: it knows every fact of a post. The same score labels the preference pairs."""

from __future__ import annotations

from collections.abc import Sequence

from src.data.mini_tldr import gold_score
from src.judges import Comparison, Judged, Response, Verdict
from src.planning.identity import EvaluateInputs, JudgeInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt


def gold(inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt) -> Judged:
    """Compare gold scores of two summaries of the same post; equal scores are a tie."""
    return Judged([_compare(comparison) for comparison in comparisons])


def grades(judge: JudgeInputs, resources: Resources, responses: Sequence[Response], attempt: Attempt) -> list[float]:
    """Return gold scores. They are sums of tenths, so that rounding cannot tell equal ones apart."""
    return [round(gold_score(r.prompt.facts, r.text, r.finished), 6) for r in responses]


def _compare(comparison: Comparison) -> Verdict:
    response, baseline = (
        gold_score(comparison.prompt.facts, row["response"], row["finished"])
        for row in (comparison.response, comparison.baseline)
    )
    # Scores are sums of tenths, so a smaller difference is rounding.
    value = 0.5 if abs(response - baseline) < 1e-9 else float(response > baseline)
    return Verdict(value, f"gold score {response:.1f} against {baseline:.1f}")
