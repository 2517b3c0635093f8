"""Arena-Hard v2: two games in swapped order, as in v0.1, in categories with their own baseline and system prompt.

Verdicts, weights, scores and intervals are the benchmark's (lmarena/arena-hard-auto); so is the prompt, when
judge.prompt_file has it. What is ours of the style control is said in `src.judges.style_control`.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from src.judges import Comparison, Judged, Verdict
from src.judges.arena_hard import LABELS, NUM_BOOTSTRAP_ROUNDS, Game, average_games, play
from src.judges.judge_client import JudgeClient, Messages, usage_of
from src.judges.prompt_file import load_category_prompts
from src.judges.style_control import style_difference, win_rates_at_equal_style
from src.planning.content import reading
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

INTERVAL = (5, 95)  # percentiles (v2)

PROMPT_FILE = str(Path(__file__).with_suffix(".yaml"))  # without judge.prompt_file
_PATTERNS = (re.compile(r"\[\[([AB<>=]+)\]\]"), re.compile(r"\[([AB<>=]+)\]"))  # the second where the first finds none

_MIRRORED = {label[::-1].translate(str.maketrans("<>", "><")): label for label in LABELS}


class Match(NamedTuple):
    """The games of a question; without a verdict of either there are none."""

    games: tuple[Game, ...]
    difference: NDArray[np.float64]  # of style, response - baseline


def arena_hard_v2(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Play two games per question; its verdict is their weighted mean, a tie unless both have a label."""
    judge = inputs.judge
    assert judge is not None
    with reading(judge.prompt_file):
        systems, template = load_category_prompts(judge.prompt_file.location if judge.prompt_file else PROMPT_FILE)
    chats = [chat for c in comparisons for chat in build_chats(c, systems[c.prompt.facts["category"]], template)]
    answers = JudgeClient(judge, resources.judge, attempt.output_dir).complete(chats, attempt)
    texts = [answer["text"] for answer in answers]
    games = [parse_game(text, response_is="BA"[i % 2]) for i, text in enumerate(texts)]
    usage = usage_of(resources.judge, answers, attempt, unparsable=games.count(None))
    matches: dict[str, list[Match]] = {}
    verdicts: list[Verdict] = []
    for comparison, number in zip(comparisons, range(0, len(games), 2), strict=True):
        both = tuple(game for game in games[number : number + 2] if game is not None)
        both = both if len(both) == 2 else ()  # the benchmark drops the question
        _, response, baseline = comparison.texts
        match = Match(both, style_difference(response, baseline))
        matches.setdefault(comparison.prompt.facts["category"], []).append(match)
        verdicts.append(average_games(both or (None, None), texts[number : number + 2]))
    scores = {name: score for category, rows in matches.items() for name, score in category_scores(category, rows)}
    return Judged(verdicts, usage, scores)


def build_chats(comparison: Comparison, system: str, template: str) -> list[Messages]:
    """Return two chats: with the response as assistant B, then as A, in the benchmark's order."""
    question, response, baseline = comparison.texts
    contents = [
        template.format(QUESTION=question, ANSWER_A=a, ANSWER_B=b)
        for a, b in ((baseline, response), (response, baseline))
    ]
    return [[{"role": "system", "content": system}, {"role": "user", "content": content}] for content in contents]


def parse_game(text: str, response_is: str) -> Game | None:
    """Return the game of a response that was assistant A or B, by the last label of the text; None without one."""
    found = next((labels for pattern in _PATTERNS if (labels := pattern.findall(text.upper()))), [""])
    return play(_MIRRORED.get(found[-1], found[-1]), response_is)


def category_scores(category: str, matches: Sequence[Match]) -> Iterator[tuple[str, dict[str, float]]]:
    """Yield the score of a category, and the style-controlled one: name, and value, low and high in percent.

    The value is the mean of bootstrap means, and with style control the median; low and high are percentiles.
    """
    games = [(game, match.difference) for match in matches for game in match.games]
    if not games:
        return
    weights = [game.weight for game, _ in games]
    points = np.repeat([game.points for game, _ in games], weights)
    differences = np.repeat([difference for _, difference in games], weights, axis=0)
    means = np.array([points[indices].mean() for indices in resamplings(len(points))])
    yield category, _interval(float(means.mean()), means)
    controlled = win_rates_at_equal_style(points, differences, resamplings(len(points)))
    yield f"{category}_style_controlled", _interval(float(np.median(controlled)), controlled)


def resamplings(size: int) -> Iterator[NDArray[np.int64]]:
    """Yield (size,) indices drawn with replacement, the same ones in every call."""
    rng = np.random.default_rng(42)
    return (rng.integers(0, size, size) for _ in range(NUM_BOOTSTRAP_ROUNDS))


def _interval(value: float, rounds: NDArray[np.float64]) -> dict[str, float]:
    low, high = np.percentile(rounds, INTERVAL)
    return {"value": 100 * value, "low": 100 * float(low), "high": 100 * float(high)}
