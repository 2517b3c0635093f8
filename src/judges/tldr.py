"""A language model compares two summaries of a post, in both orders: GPT-4o's part in arXiv 2502.01237, section 3."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

from src.judges import Comparison, Judged, Verdict
from src.judges.judge_client import JudgeClient, Messages, usage_of
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

# The paper's criteria; it does not print its prompt.
INSTRUCTIONS = Path(__file__).with_suffix(".txt").read_text(encoding="utf-8").strip()

# A lower-case letter counts only at the end of a line: "a" is also a word.
_VERDICT = re.compile(r"(?i:verdict)\W*(?:(?i:summary)\W*)?\b([ABC]\b(?! tie| draw)|[abc](?=\W*$))", re.MULTILINE)
_LETTER_ALONE = re.compile(r"\W*([ABC])\W*")


def tldr(inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt) -> Judged:
    """Ask the judge twice for each comparison, with the response as summary A and as summary B, and average.

    An answer without a verdict is left out, a comparison without any verdict is a tie; both are counted.
    """
    assert inputs.judge is not None
    chats = [chat for comparison in comparisons for chat in build_chats(comparison)]
    answers = JudgeClient(inputs.judge, resources.judge, attempt.output_dir).complete(chats, attempt)
    verdicts = [
        average_games(as_a["text"], as_b["text"]) for as_a, as_b in zip(answers[::2], answers[1::2], strict=True)
    ]
    unparsable = sum(parse_winner(answer["text"]) is None for answer in answers)
    return Judged(verdicts, usage_of(resources.judge, answers, attempt, unparsable))


def build_chats(comparison: Comparison) -> list[Messages]:
    """Return two chats: with the response as summary A, then as summary B."""
    post, response, baseline = comparison.texts
    return [
        [{"role": "user", "content": INSTRUCTIONS.format(post=post, a=a, b=b)}]
        for a, b in ((response, baseline), (baseline, response))
    ]


def parse_winner(text: str) -> str | None:
    """Return A, B or C (neither), or None without a verdict. The last one counts: a model may quote the task."""
    if letters := _VERDICT.findall(text):
        return letters[-1].upper()
    alone = _LETTER_ALONE.fullmatch(text.strip())
    return alone[1] if alone else None


def average_games(as_a: str, as_b: str) -> Verdict:
    """Average both games. as_a, as_b: the judge's answer when the response is summary A, and when it is summary B."""
    values = {"A": 1.0, "B": 0.0, "C": 0.5}
    winner_as_a, winner_as_b = parse_winner(as_a), parse_winner(as_b)
    games = [values[winner_as_a]] if winner_as_a else []
    games += [1 - values[winner_as_b]] if winner_as_b else []
    value = sum(games) / len(games) if games else 0.5
    first = tuple(values[winner] for winner in (winner_as_a, winner_as_b) if winner)
    return Verdict(value, f"as A: {as_a.strip() or '(nothing)'}\nas B: {as_b.strip() or '(nothing)'}", first)
