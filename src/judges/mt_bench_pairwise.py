"""MT-Bench, pairwise: a language model compares both answers of a conversation with a baseline's, in both orders.

As in FastChat's llm_judge a response wins when it does in both games, and loses when it loses both; all else is a tie.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from src.judges import Comparison, Judged, Verdict
from src.judges.judge_client import JudgeClient, usage_of
from src.judges.mt_bench_turns import load_prompts, standard_error, turns_of
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

_LABEL = re.compile(r"\[\[([ABC])\]\]")
PREFERENCES = {"A": 1.0, "B": 0.0, "C": 0.5}  # for the answer that is shown first


def mt_bench_pairwise(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Play two games per turn, with the response as assistant A, and as assistant B.

    A turn with a game without a label is a tie here, and left out of the benchmark's score.
    """
    assert inputs.judge is not None
    prompts = load_prompts(inputs)
    turns = list(turns_of(inputs, resources, comparisons))
    chats = [
        turn.chat(prompts, "pair", answer_a=a, answer_b=b)
        for turn in turns
        for a, b in ((turn.responses, turn.baselines), (turn.baselines, turn.responses))
    ]
    answers = JudgeClient(inputs.judge, resources.judge, attempt.output_dir).complete(chats, attempt)
    texts = [answer["text"] for answer in answers]
    unparsable = sum(parse_label(text) is None for text in texts)
    outcomes = [outcome(as_a, as_b) for as_a, as_b in zip(texts[::2], texts[1::2], strict=True)]
    reasons = (
        f"as A: {as_a.strip() or '(nothing)'}\nas B: {as_b.strip() or '(nothing)'}"
        for as_a, as_b in zip(texts[::2], texts[1::2], strict=True)
    )
    first = [PREFERENCES[label] if (label := parse_label(text)) else None for text in texts]
    orders = (tuple(value for value in pair if value is not None) for pair in zip(first[::2], first[1::2], strict=True))
    verdicts = [
        Verdict(0.5 if value is None else value, reason, order)
        for value, reason, order in zip(outcomes, reasons, orders, strict=True)
    ]
    of_question: dict[int, list[float]] = {}
    for comparison, value in zip(comparisons, outcomes, strict=True):
        if value is not None:
            of_question.setdefault(comparison.response["index"], []).append(value)
    values = [value for several in of_question.values() for value in several]
    error = standard_error(of_question)
    scores = {}
    if error is not None:
        scores["mt_bench_win_rate"] = {"value": 100 * sum(values) / len(values), "se": 100 * error}
    return Judged(verdicts, usage_of(resources.judge, answers, attempt, unparsable), scores)


def parse_label(text: str) -> str | None:
    """Return A, B or C, a tie; None without a label, or with two that differ."""
    labels = set(_LABEL.findall(text))
    return labels.pop() if len(labels) == 1 else None


def outcome(as_a: str, as_b: str) -> float | None:
    """Return 1 when the response wins both games, 0 when it loses both, else .5; None when a game has no label.

    as_a, as_b: the judge's answer when the response is assistant A, and when it is B.
    """
    games = parse_label(as_a), parse_label(as_b)
    if None in games:
        return None
    return {("A", "B"): 1.0, ("B", "A"): 0.0}.get(games, 0.5)  # type: ignore[arg-type]
