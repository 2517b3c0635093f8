"""Labels of Arena-Hard's judge -> games -> the win rate of a logistic model."""

import math
import random

import numpy as np
import pytest
from scipy.optimize import minimize_scalar

from src.judges.arena_hard import Game, parse_game, win_rate


@pytest.mark.parametrize(
    ("text", "as_a", "as_b"),
    [
        ("... My verdict is [[A>>B]].", Game(1.0, 3), Game(0.0, 3)),
        ("[[B>A]]", Game(0.0, 1), Game(1.0, 1)),
        ("[[A=B]]", Game(0.5, 1), Game(0.5, 1)),
        ("[[A>B]], so [[A>B]]", Game(1.0, 1), Game(1.0 - 1.0, 1)),
        ("[[A>B]] or [[B>A]]", None, None),
        ("A is better", None, None),
        ("[[A]]", None, None),
    ],
)
def test_a_label_is_scored_for_either_side(text, as_a, as_b):
    assert parse_game(text, response_is="A") == as_a and parse_game(text, response_is="B") == as_b


def test_the_win_rate_is_that_of_bradley_terry_against_one_baseline():
    rng = random.Random(0)
    games = [
        Game(*rng.choices([(1.0, 3), (1.0, 1), (0.5, 1), (0.0, 1), (0.0, 3)], [1, 3, 2, 4, 3])[0]) for _ in range(300)
    ]
    won = np.repeat([g.points for g in games], [g.weight for g in games])

    def loss(strength):  # of the logistic model, a tie being half a win of each
        return -(won * -np.log1p(np.exp(-strength)) + (1 - won) * -np.log1p(np.exp(strength))).sum()

    strength = minimize_scalar(loss, bounds=(-5, 5), method="bounded", options={"xatol": 1e-9}).x
    rate = win_rate(games)
    assert rate["value"] == pytest.approx(100 / (1 + math.exp(-strength)), abs=1e-3)
    assert rate["value"] != pytest.approx(100 * np.mean([g.points for g in games]), abs=0.5)  # weights count
    error = 100 * won.std(ddof=1) / math.sqrt(len(won))
    assert rate["low"] == pytest.approx(rate["value"] - 1.96 * error, abs=0.8 * error)
    assert rate["high"] == pytest.approx(rate["value"] + 1.96 * error, abs=0.8 * error)
