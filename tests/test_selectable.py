"""No model is given up that the finished sweep selects, whatever the order in which results arrive."""

import random
from functools import cache
from itertools import product

import numpy as np
import pytest

from src.store import selectable as module
from src.store.selectable import Measured, selectable
from sweeps.analysis.selection import average_seeds, select_points
from tests.support.tables import points

RULES = ("best", "lowest_kl_in_shortlist")
NUM_PROMPTS = 48


class Prompts:
    """Quality per prompt, in the place of the files of a store."""

    def __init__(self, values):
        self.values = values

    def selection(self, groups):
        return np.array([np.mean([self.values[i] for i in group], axis=0) for group in groups])


class Sweep:
    """Two methods over betas, learning rates and seeds, with the results that its points will have."""

    def __init__(self, seed: int):
        rng = random.Random(seed)
        self.num_seeds = rng.choice([1, 1, 2, 3])
        grid = product(("dpo", "ipo"), (0.1, 1.0, 3.0)[: rng.choice([2, 3])], (1e-6, 1e-5), range(self.num_seeds))
        difficulty, spread = [rng.random() for _ in range(NUM_PROMPTS)], rng.choice([0.05, 0.3])
        self.rows, self.values = [], {}
        for n, (method, beta, lr, number) in enumerate(grid):
            ability = 0.6 + spread * rng.choice([0.0, 0.0, 0.5, -0.5, rng.gauss(0, 1)])  # with ties
            flips = rng.choice([0.0, 0.0, 0.2])
            values = [float((d < ability) != (rng.random() < flips)) for d in difficulty]
            self.values[str(n)] = values
            quality = float("nan") if rng.random() < 0.03 else sum(values) / NUM_PROMPTS
            row = {"method": method, "beta": beta, "lr": lr, "seed": number, "kl_sequence": rng.random()}
            self.rows.append(row | {"quality_selection": quality})
        self.order = [str(n) for n in range(len(self.rows))]
        rng.shuffle(self.order)
        self.num_failed = rng.choice([0, 0, 0, 2])
        self.lost = set(self.order[len(self.order) - self.num_failed :])  # that never have a result

    def measured(self, finished):
        """Return the points as retention sees them when these have finished."""
        for n, row in enumerate(self.rows):
            if row["quality_selection"] == row["quality_selection"] or str(n) not in finished:
                quality = row["quality_selection"] if str(n) in finished else None
                yield Measured(str(n), ("s", row["method"], "sft", ""), row["beta"], row["lr"], quality, NUM_PROMPTS)

    @cache  # noqa: B019
    def selected(self, rule):
        """Return the results that the finished sweep selects."""
        rows = [row | {"state": "failed" if str(n) in self.lost else "done"} for n, row in enumerate(self.rows)]
        best = select_points(average_seeds(points(*rows)), rule, Prompts(self.values))
        return {identity for identities in best.identities for identity in identities}


sweep_of = cache(Sweep)
SEEDS = range(60)


def lost_models(sweep: Sweep, rule: str) -> set[str]:
    """Return what the finished sweep selects of what was given up after any of its results."""
    given_up: set[str] = set()
    for number in range(len(sweep.order) - sweep.num_failed + 1):
        finished = set(sweep.order[:number])
        given_up |= finished - selectable(sweep.measured(finished), rule)
    return given_up & sweep.selected(rule)


@pytest.mark.parametrize("rule", RULES)
def test_what_the_finished_sweep_selects_was_never_given_up(rule):
    assert not any(lost_models(sweep_of(seed), rule) for seed in SEEDS)


# The mean of the seeds that are there, as if none were missing.
MEAN = property(lambda row: sum(row.qualities) / len(row.qualities))
BROKEN = {
    "seeds": [(module._Row, "low", MEAN), (module._Row, "high", MEAN)],
    "ties": [(module._Row, "rank", property(lambda row: (row.low, row.beta, row.lr)))],  # the larger lr
    "shortlist": [(module, "_may_be_similar", lambda quality, best, n: quality >= best)],  # the best alone
}


@pytest.mark.parametrize(
    ("broken", "rule"), [("seeds", RULES[0]), ("seeds", RULES[1]), ("ties", RULES[0]), ("shortlist", RULES[1])]
)
def test_without_one_of_its_bounds_the_rule_would_lose_models(broken, rule, monkeypatch):
    for change in BROKEN[broken]:
        monkeypatch.setattr(*change)
    assert any(lost_models(sweep_of(seed), rule) for seed in SEEDS)


def test_decisions_are_never_taken_back():
    """So two jobs that see different results may both remove models."""
    for seed, rule in product(SEEDS, RULES):
        sweep, given_up = sweep_of(seed), set()
        for number in range(len(sweep.order) + 1):
            finished = set(sweep.order[:number])
            now = finished - selectable(sweep.measured(finished), rule)
            assert given_up <= now
            given_up = now


def test_of_one_seed_each_method_has_one_candidate_at_any_time():
    for seed in SEEDS:
        sweep = sweep_of(seed)
        if sweep.num_seeds == 1:
            for number in range(len(sweep.order) + 1):
                assert len(selectable(sweep.measured(set(sweep.order[:number])), "best")) <= len(("dpo", "ipo"))
