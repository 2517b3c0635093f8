"""The gold judge of mini TL;DR: the generator knows every fact of a post, and is also who labelled the pairs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING

from src.data.mini_tldr import gold_score
from src.judges import Comparison, Judged, Verdict
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources

if TYPE_CHECKING:
    from src.store.attempt import Attempt


def gold(inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt) -> Judged:
    """Win: a higher gold score than the baseline's sample on the same post; equal: a tie."""
    return Judged([_verdict(comparison) for comparison in comparisons])


def _verdict(comparison: Comparison) -> Verdict:
    rows = (comparison.response, comparison.baseline)
    own, other = (gold_score(comparison.prompt.facts, row["response"], row["finished"]) for row in rows)
    # Scores are sums of tenths: nearer than this they are the same.
    value = 0.5 if abs(own - other) < 1e-9 else float(own > other)
    return Verdict(value, f"gold score {own:.1f} against {other:.1f}")
