"""Promotion to the next rung, and which requests are refused: decision logic alone, no store and no training."""

from dataclasses import replace

import pytest

from src.config.schema import Point
from src.errors import ConfigError
from sweeps.search.successive_halving import RungState, entry_rungs, expected_counts, promote
from tests.support.configs import point


def grid(methods=("dpo",), betas=(0.1, 0.2, 0.3, 0.4), lrs=(1e-3,), seeds=(0,)) -> list[Point]:
    base = point()
    method = {name: replace(base.method, name=name) for name in methods}
    return [
        replace(base, method=method[m], beta=b, lr=lr, seed=s)
        for m in methods
        for b in betas
        for lr in lrs
        for s in seeds
    ]


def promoted(points, quality, keep_fraction=0.5):
    rungs = promote(points, [0] * len(points), quality, 0, keep_fraction)
    return [(p.method.name, p.beta, p.seed) for p, rung in zip(points, rungs, strict=True) if rung == 1]


def test_the_best_fraction_of_each_method_is_promoted():
    points = grid(("dpo", "ipo"))
    assert promoted(points, [0.1, 0.9, 0.8, 0.2, 0.04, 0.03, 0.02, 0.01]) == [
        *(("dpo", 0.2, 0), ("dpo", 0.3, 0)),
        *(("ipo", 0.1, 0), ("ipo", 0.2, 0)),
    ], "the fraction is that of each method, also of one that is worse everywhere"
    assert len(promoted(points, [0.0] * 8, keep_fraction=0.75)) == 6
    assert len(promoted(points, [0.0] * 8, keep_fraction=0.1)) == 2
    many = grid(betas=[b / 1000 for b in range(1, 101)])
    assert len(promoted(many, [0.0] * 100, keep_fraction=0.29)) == 29, "0.29 * 100 is below 29 in floating point"


def test_of_equals_the_larger_beta_then_the_smaller_lr_is_promoted_whatever_the_order():
    points = grid(betas=(0.1, 0.2), lrs=(1e-3, 1e-4))
    for order in (points, points[::-1]):
        rungs = promote(order, [0] * 4, [0.5] * 4, 0, 0.25)
        assert [(p.beta, p.lr) for p, rung in zip(order, rungs, strict=True) if rung] == [(0.2, 1e-4)]


def test_seeds_of_a_point_are_promoted_together_by_their_mean():
    points = grid(betas=(0.1, 0.2), seeds=(0, 1))
    assert promoted(points, [0.9, 0.1, 0.6, 0.6]) == [("dpo", 0.2, 0), ("dpo", 0.2, 1)], "not the one lucky seed"
    assert promoted(points, [0.9, 0.4, 0.6, 0.6]) == [("dpo", 0.1, 0), ("dpo", 0.1, 1)]


def test_a_point_without_a_result_is_not_promoted():
    points = grid(betas=(0.1, 0.2), seeds=(0, 1))
    assert promoted(points, [None, None, 0.1, None]) == [("dpo", 0.2, 0)]
    assert promoted(points, [None] * 4) == []


def test_a_finished_full_run_enters_at_the_last_rung_unless_the_first_rung_is_finished_too():
    points = grid(seeds=(0, 1), betas=(0.1, 0.2))
    assert entry_rungs(points, [True] * 4, [False] * 4, 2) == [2] * 4
    assert entry_rungs(points, [True, True, True, False], [False] * 4, 2) == [2, 2, 0, 0], "seeds stay together"
    assert entry_rungs(points, [True] * 4, [True, False, False, False], 2) == [0, 0, 2, 2]
    entry = 2, 0, 0, 0
    state = RungState(tuple(grid()), (0.25, 0.5, 1.0), 0.5, rung=0, entry=entry, rung_of=entry, results=())
    assert expected_counts(state) == [3, 1, 2]


RUNGS = "must be an increasing list of step fractions ending in 1.0"
INVALID = [
    ("sweep.rungs=[0.5,0.25,1]", f"sweep.rungs=[0.5, 0.25, 1.0]: {RUNGS}"),
    ("sweep.rungs=[0.25,0.5]", RUNGS),
    ("sweep.rungs=[0,1]", "sweep.rungs[0]=0: must be > 0 and <= 1"),
    ("sweep.rungs=[]", RUNGS),
    ("sweep.keep_fraction=0", "sweep.keep_fraction=0: must be > 0 and <= 1"),
    ("sweep.keep_fraction=1.5", "sweep.keep_fraction=1.5: must be > 0 and <= 1"),
    ("sweep.search=random", "sweep.search=random: must be one of grid, successive_halving"),
    ("trainer.align.stop_fraction=0", "trainer.align.stop_fraction=0: must be > 0 and <= 1"),
    ("trainer.align.stop_fraction=0.5", "stops points itself at sweep.rungs"),
]


@pytest.mark.parametrize(("override", "message"), INVALID, ids=[override for override, _ in INVALID])
def test_an_invalid_value_is_an_error_that_names_the_key(override, message):
    search = [] if override.startswith("sweep.search") else ["sweep.search=successive_halving"]
    with pytest.raises(ConfigError) as raised:
        point(*search, override)
    assert message in str(raised.value)
