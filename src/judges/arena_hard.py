"""Arena-Hard v0.1: a language model compares an answer with the baseline's in two games, once in each order. Labels,
weights, score and interval are the benchmark's; so are the words, when judge.prompt_file names its own config."""

from __future__ import annotations

import logging
import re
from collections.abc import Sequence
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from src.judges import Comparison, Judged, Verdict
from src.judges.answers import Answers
from src.judges.judge_client import JudgeClient, Messages, usage
from src.judges.prompt_file import load_judge_prompt
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.store.store import Store

if TYPE_CHECKING:
    from src.store.attempt import Attempt

log = logging.getLogger(__name__)

ROUNDS = 100  # of the bootstrap (v0.1)
HEAVY = 3  # games that a verdict with >> counts as (v0.1)

SYSTEM = """You judge two assistants' answers to one user. First write down how you would answer yourself. Then go
through both answers, say where each is wrong or unclear, and weigh them: is it correct, does it help with what was
asked, is it to the point and concise, and does it have what the question leaves unsaid but needs? Neither the order of
the answers nor their style counts. End with one label:

[[A>>B]] the answer of A is far better
[[A>B]] it is somewhat better
[[A=B]] they are about as good
[[B>A]] the answer of B is somewhat better
[[B>>A]] it is far better"""

TEMPLATE = """Question of the user:
{question_1}

Answer of assistant A:
{answer_1}

Answer of assistant B:
{answer_2}"""

_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")

# label -> what A gets of a game, and how many games it counts as
LABELS = {"A>>B": (1.0, HEAVY), "A>B": (1.0, 1), "A=B": (0.5, 1), "B>A": (0.0, 1), "B>>A": (0.0, HEAVY)}


class Game(NamedTuple):
    score: float  # of the response: 1, .5 or 0
    weight: int


def arena_hard(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """A verdict is the weighted mean of its two games, a tie when neither has a label."""
    judge = inputs.judge
    assert judge is not None
    words = load_judge_prompt(judge.prompt_file.location) if judge.prompt_file else (SYSTEM, TEMPLATE)
    answers_dir = Store(attempt.output_dir).answers("arena_hard", judge.model_name)
    endpoint = JudgeClient(judge, resources.judge, Answers(answers_dir))
    answers = endpoint.ask([q for comparison in comparisons for q in _questions(comparison, *words)], attempt)
    texts = [answer["text"] for answer in answers]
    games = [game(text, response_is="BA"[i % 2]) for i, text in enumerate(texts)]
    if all(played is None for played in games):
        log.warning("%s: no answer of the judge has a label; its first: %r", attempt.label, texts[0][:200])
    verdicts = [
        _verdict(own, reasons)
        for own, reasons in zip(zip(*[iter(games)] * 2, strict=True), zip(*[iter(texts)] * 2, strict=True), strict=True)
    ]
    found = usage(resources.judge, answers, attempt, unparsable=sum(played is None for played in games))
    scored = score([played for played in games if played is not None])
    return Judged(verdicts, found, {"arena_hard": scored} if scored else {})


def game(text: str, response_is: str) -> Game | None:
    """What a game was to the response, which was assistant A or B; None without a label, or with two that differ."""
    labels = {label for label in _LABEL.findall(text) if label}
    label = labels.pop() if len(labels) == 1 else ""
    if label not in LABELS:
        return None
    of_a, weight = LABELS[label]
    return Game(of_a if response_is == "A" else 1 - of_a, weight)


def score(games: Sequence[Game]) -> dict[str, float]:
    """Share of games won, ties half, >> three times: what Bradley-Terry says against one baseline. low, high: 2.5 and
    97.5 percentiles over resampled games, a game that counts as three being three of them. All in percent."""
    if not games:
        return {}
    rows = np.repeat([g.score for g in games], [g.weight for g in games])
    rng = np.random.default_rng(42)
    means = [rows[rng.integers(0, len(rows), len(rows))].mean() for _ in range(ROUNDS)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"value": 100 * float(rows.mean()), "low": 100 * float(low), "high": 100 * float(high)}


def _verdict(games: tuple[Game | None, ...], texts: tuple[str, ...]) -> Verdict:
    played = [g for g in games if g is not None]
    value = sum(g.score * g.weight for g in played) / sum(g.weight for g in played) if played else 0.5
    return Verdict(
        value, "\n".join(f"as {name}: {t.strip() or '(nothing)'}" for name, t in zip("BA", texts, strict=True))
    )


def _questions(comparison: Comparison, system: str, template: str) -> list[Messages]:
    """The response as B, then as A, in the benchmark's order."""
    own, other = comparison.response["response"], comparison.baseline["response"]
    question = comparison.prompt.text
    return [
        [
            {"role": "system", "content": system},
            {"role": "user", "content": template.format(question_1=question, answer_1=a, answer_2=b)},
        ]
        for a, b in ((other, own), (own, other))
    ]
