"""The gold judge of mini TL;DR: the generator knows every fact of a post, and is also who labelled the pairs."""

from __future__ import annotations

from typing import Any

from src.data.mini_tldr import gold_score
from src.data.rows import Prompt
from src.judges import Verdict


def gold(prompt: Prompt, response: dict[str, Any], baseline: dict[str, Any]) -> Verdict:
    """Win: a higher gold score than the baseline's sample on the same post; equal: a tie."""
    own, other = (gold_score(prompt.facts, row["response"], row["finished"]) for row in (response, baseline))
    # Scores are sums of tenths: nearer than this they are the same.
    value = 0.5 if abs(own - other) < 1e-9 else float(own > other)
    return Verdict(value, f"gold score {own:.1f} against {other:.1f}")
