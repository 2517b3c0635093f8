"""The verdicts of mini TL;DR's gold judge, as an endpoint gives them to judge=tldr."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from src.data.mini_tldr import gold_score


def gold_verdict(question: str, facts: Mapping[str, Any]) -> str:
    """Return the verdict of the gold judge on a question of judge=tldr. facts: what it knows, by post."""
    match = re.search(r"<post>\n(.*)\n</post>.*\"A\">\n(.*)\n</s.*\"B\">\n(.*)\n</s", question, re.S)
    assert match is not None
    post, a, b = match.groups()
    difference = gold_score(facts[post], a, True) - gold_score(facts[post], b, True)
    return "C" if abs(difference) < 1e-9 else "A" if difference > 0 else "B"
