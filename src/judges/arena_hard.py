"""Arena-Hard v0.1: a language model compares a response with the baseline's in two games, one in each order.

Labels, weights, score and interval are the benchmark's; so is the prompt, when judge.prompt_file names its config.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from src.judges import Comparison, Judged, Verdict
from src.judges.judge_client import JudgeClient, Messages, usage_of
from src.judges.prompt_file import load_judge_prompt
from src.planning.content import reading
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

NUM_BOOTSTRAP_ROUNDS = 100  # (v0.1)
STRONG_WIN_WEIGHT = 3  # number of games that a label with >> counts as (v0.1)

PROMPT_FILE = str(Path(__file__).with_suffix(".yaml"))  # without judge.prompt_file
_LABEL = re.compile(r"\[\[([AB<>=]+)\]\]")

# label -> points of A, and how many games it counts as
LABELS = {
    "A>>B": (1.0, STRONG_WIN_WEIGHT),
    "A>B": (1.0, 1),
    "A=B": (0.5, 1),
    "B>A": (0.0, 1),
    "B>>A": (0.0, STRONG_WIN_WEIGHT),
}


class Game(NamedTuple):
    points: float  # of the response: 1, .5 or 0
    weight: int


def arena_hard(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Play two games per comparison; its verdict is their weighted mean, a tie when neither has a label."""
    judge = inputs.judge
    assert judge is not None
    with reading(judge.prompt_file):
        prompt = load_judge_prompt(judge.prompt_file.location if judge.prompt_file else PROMPT_FILE)
    chats = [chat for comparison in comparisons for chat in _chats(comparison, *prompt)]
    answers = JudgeClient(judge, resources.judge, attempt.output_dir).complete(chats, attempt)
    texts = [answer["text"] for answer in answers]
    games = [parse_game(text, response_is="BA"[i % 2]) for i, text in enumerate(texts)]
    labeled = [game for game in games if game is not None]
    pairs = [slice(i, i + 2) for i in range(0, len(games), 2)]
    verdicts = [average_games(games[pair], texts[pair]) for pair in pairs]
    usage = usage_of(resources.judge, answers, attempt, unparsable=len(games) - len(labeled))
    return Judged(verdicts, usage, {"arena_hard": win_rate(labeled)} if labeled else {})


def parse_game(text: str, response_is: str) -> Game | None:
    """Return the game of a response that was assistant A or B; None without a label, or with two that differ."""
    labels = {label for label in _LABEL.findall(text) if label}
    return play(labels.pop() if len(labels) == 1 else "", response_is)


def play(label: str, response_is: str) -> Game | None:
    """Return the game with this label, of a response that was assistant A or B; None for what is no label."""
    if label not in LABELS:
        return None
    points_of_a, weight = LABELS[label]
    return Game(points_of_a if response_is == "A" else 1 - points_of_a, weight)


def win_rate(games: Sequence[Game]) -> dict[str, float]:
    """Return the weighted share of games won, in percent: what Bradley-Terry gives against a single baseline.

    low, high: 2.5 and 97.5 percentiles over resampled games, where a game of weight 3 is three of them.
    """
    points = np.repeat([g.points for g in games], [g.weight for g in games])
    rng = np.random.default_rng(42)
    means = [points[rng.integers(0, len(points), len(points))].mean() for _ in range(NUM_BOOTSTRAP_ROUNDS)]
    low, high = np.percentile(means, (2.5, 97.5))
    return {"value": 100 * float(points.mean()), "low": 100 * float(low), "high": 100 * float(high)}


def average_games(games: Sequence[Game | None], texts: Sequence[str]) -> Verdict:
    """Return the weighted mean of the games that have a label as a verdict, a tie without any.

    games: and texts of the answers, first with the response as B.
    """
    played = [game for game in games if game is not None]
    value = sum(g.points * g.weight for g in played) / sum(g.weight for g in played) if played else 0.5
    sides = list(zip("BA", games, strict=True))
    first = tuple(game.points if side == "A" else 1 - game.points for side, game in sides if game is not None)
    answers = zip("BA", texts, strict=True)
    return Verdict(value, "\n".join(f"as {side}: {text.strip() or '(nothing)'}" for side, text in answers), first)


def _chats(comparison: Comparison, system: str, template: str) -> list[Messages]:
    """Return two chats: with the response as assistant B, then as A, in the benchmark's order."""
    question, response, baseline = comparison.texts

    def chat(a: str, b: str) -> Messages:
        content = template.format(question_1=question, answer_1=a, answer_2=b)
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]

    return [chat(baseline, response), chat(response, baseline)]
