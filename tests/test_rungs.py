"""Who goes on to the next rung, and which requests are refused: decisions alone, no store and no training."""

from dataclasses import replace

import pytest

from src.config.schema import Point
from src.config.validation import build_point
from src.errors import ConfigError
from sweeps.search.successive_halving import advance, begin, foreseen
from tests.support.configs import composed


def grid(methods=("dpo",), betas=(0.1, 0.2, 0.3, 0.4), lrs=(1e-3,), seeds=(0,)) -> list[Point]:
    point = build_point(composed())
    method = {name: replace(point.method, name=name) for name in methods}
    return [
        replace(point, method=method[m], beta=b, lr=lr, seed=s)
        for m in methods
        for b in betas
        for lr in lrs
        for s in seeds
    ]


def going(points, quality, share=0.5):
    after = advance(points, [0] * len(points), quality, 0, share)
    return [(p.method.name, p.beta, p.seed) for p, at in zip(points, after, strict=True) if at == 1]


def test_the_better_share_of_each_method_goes_on():
    points = grid(("dpo", "ipo"))
    assert going(points, [0.1, 0.9, 0.8, 0.2, 0.04, 0.03, 0.02, 0.01]) == [
        *(("dpo", 0.2, 0), ("dpo", 0.3, 0)),
        *(("ipo", 0.1, 0), ("ipo", 0.2, 0)),
    ], "a method that is worse everywhere keeps its share"
    assert len(going(points, [0.0] * 8, share=0.75)) == 6 and len(going(points, [0.0] * 8, share=0.1)) == 2
    many = grid(betas=[b / 1000 for b in range(1, 101)])
    assert len(going(many, [0.0] * 100, share=0.29)) == 29, "0.29 * 100 is below 29 in floating point"


def test_of_equals_the_larger_beta_then_the_smaller_rate_whatever_the_order():
    points = grid(betas=(0.1, 0.2), lrs=(1e-3, 1e-4))
    for order in (points, points[::-1]):
        after = advance(order, [0] * 4, [0.5] * 4, 0, 0.25)
        assert [(p.beta, p.lr) for p, at in zip(order, after, strict=True) if at] == [(0.2, 1e-4)]


def test_seeds_of_a_point_stay_together_and_count_by_their_mean():
    points = grid(betas=(0.1, 0.2), seeds=(0, 1))
    assert going(points, [0.9, 0.1, 0.6, 0.6]) == [("dpo", 0.2, 0), ("dpo", 0.2, 1)], "not the one lucky seed"
    assert going(points, [0.9, 0.4, 0.6, 0.6]) == [("dpo", 0.1, 0), ("dpo", 0.1, 1)]


def test_what_has_no_result_goes_no_further():
    points = grid(betas=(0.1, 0.2), seeds=(0, 1))
    assert going(points, [None, None, 0.1, None]) == [("dpo", 0.2, 0)]
    assert going(points, [None] * 4) == []


def test_a_result_of_a_whole_run_enters_at_the_last_rung_unless_it_has_come_from_the_first():
    points = grid(seeds=(0, 1), betas=(0.1, 0.2))
    assert begin(points, [True] * 4, [False] * 4, 2) == [2] * 4
    assert begin(points, [True, True, True, False], [False] * 4, 2) == [2, 2, 0, 0], "seeds stay together"
    assert begin(points, [True] * 4, [True, False, False, False], 2) == [0, 0, 2, 2]
    assert foreseen(grid(), [2, 0, 0, 0], [2, 0, 0, 0], 0, 3, 0.5) == [3, 1, 2]


BAD = [
    ("sweep.rungs=[0.5,0.25,1]", "sweep.rungs=[0.5, 0.25, 1.0]: must be shares of alignment's steps that rise and end"),
    ("sweep.rungs=[0.25,0.5]", "must be shares of alignment's steps that rise and end with 1"),
    ("sweep.rungs=[0,1]", "that rise"),
    ("sweep.rungs=[]", "that rise"),
    ("sweep.keep_fraction=0", "sweep.keep_fraction=0: must be > 0 and <= 1"),
    ("sweep.keep_fraction=1.5", "sweep.keep_fraction=1.5: must be > 0 and <= 1"),
    ("sweep.search=random", "sweep.search=random: must be one of grid, halving"),
    ("trainer.align.stop_fraction=0", "trainer.align.stop_fraction=0: must be > 0 and <= 1"),
    ("trainer.align.stop_fraction=0.5", "sweep.search=successive_halving stops points itself; give sweep.rungs"),
]


@pytest.mark.parametrize(("override", "message"), BAD, ids=[override for override, _ in BAD])
def test_a_bad_value_is_an_error_that_names_the_key(override, message):
    own = [] if override.startswith("sweep.search") else ["sweep.search=successive_halving"]
    with pytest.raises(ConfigError) as raised:
        build_point(composed(*own, override))
    assert message in str(raised.value)
