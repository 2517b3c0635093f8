"""Methods against one another: the paper's p-values from its own table, and independent computations."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
from scipy.stats import bootstrap, norm

from sweeps.comparison import (
    bootstrap_means,
    holm,
    interval,
    mean_difference_and_p,
    on_pareto_front,
    paired_differences,
    paired_p,
    pairwise_against_pointwise,
)

# arXiv 2502.01237, Table 2: DPO, IPO, SimPO, ORPO (pairwise), then APO-Zero, NCA, Cal-DPO, ASFT (pointwise).
TABLE_2 = {
    "3B LC": (11.43, 11.24, 10.56, 10.67, 10.36, 10.33, 10.62, 10.63),
    "3B WR": (11.79, 11.67, 11.94, 12.23, 11.22, 11.02, 10.15, 9.21),
    "3B AH": (6.8, 6.8, 6.4, 6.6, 6.0, 5.1, 4.8, 5.1),
    "8B LC": (26.82, 28.18, 27.65, 28.25, 23.15, 23.21, 23.19, 20.82),
    "8B WR": (23.69, 24.43, 25.62, 28.59, 19.03, 18.67, 18.85, 16.34),
    "8B AH": (19.0, 19.1, 21.5, 20.9, 17.3, 15.1, 15.2, 13.5),
}


@pytest.mark.parametrize(
    ("column", "difference", "splits"),
    [
        ("3B LC", 0.49, 4),
        ("3B WR", 1.51, 1),
        ("3B AH", 1.40, 1),
        ("8B LC", 5.13, 1),
        ("8B WR", 7.36, 1),
        ("8B AH", 4.85, 1),
    ],
)
def test_the_permutation_test_gives_the_papers_p_values(column, difference, splits):
    values = TABLE_2[column]
    found, p = mean_difference_and_p(values[:4], values[4:])
    assert found == pytest.approx(difference, abs=0.006)
    assert p == pytest.approx(splits / 70)
    # By hand: every choice of four of the eight.
    means = [np.mean(c) - (sum(values) - sum(c)) / 4 for c in combinations(values, 4)]
    assert sum(m >= found - 1e-9 for m in means) == splits and len(means) == 70


def test_a_sweeps_best_points_are_compared_by_kind_where_there_are_enough():
    kinds = ["pairwise"] * 4 + ["pointwise"] * 4
    best = pd.DataFrame({"kind": kinds, "quality_reporting": TABLE_2["8B LC"]}).assign(
        setup="8b", init="sft", variant=""
    )
    few = best.iloc[3:].assign(setup="one pairwise method")
    (row,) = pairwise_against_pointwise(pd.concat([best, few])).to_dict("records")
    assert (row["setup"], row["pairwise"], row["pointwise"], row["splits"]) == ("8b", 4, 4, 70)
    assert row["difference"] == pytest.approx(5.13, abs=0.006) and row["p"] == pytest.approx(1 / 70)


def test_the_other_direction_is_not_significant():
    values = TABLE_2["8B WR"]
    assert mean_difference_and_p(values[4:], values[:4])[1] == 1


def test_holm_adjusts_in_steps_and_keeps_the_order():
    # Holm's procedure by its definition: the k-th smallest of m is rejected at level a if all smaller ones are and
    # p <= a / (m - k + 1); an adjusted p is the smallest such level.
    p = [0.01, 0.04, 0.03, 0.005, 0.5]
    assert holm(p) == pytest.approx([0.04, 0.09, 0.09, 0.025, 0.5])
    assert holm([0.9, 0.8]) == [1, 1] and holm([]) == []


def test_intervals_are_those_of_scipys_paired_bootstrap():
    generator = np.random.default_rng(1)
    difficulty = generator.normal(size=256)
    a = (difficulty + generator.normal(size=256) > 0).astype(float)
    b = (difficulty + generator.normal(size=256) > 0.3).astype(float)
    means = bootstrap_means(np.array([a, b]))
    assert means.shape == (10_000, 2)
    theirs = bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        vectorized=True,
        rng=np.random.default_rng(2),
    ).confidence_interval
    ours = interval(means[:, 0] - means[:, 1])
    assert ours == pytest.approx((theirs.low, theirs.high), abs=0.006)
    # Pairing is worth something: as if the prompts were not the same, the interval would be wider.
    alone = 2 * norm.ppf(0.975) * np.sqrt(a.var() / 256 + b.var() / 256)
    assert ours[1] - ours[0] < 0.95 * alone


def test_equal_methods_do_not_differ_and_a_better_one_does():
    generator = np.random.default_rng(0)
    a = (generator.random(400) < 0.6).astype(float)
    values = np.array([a, a, np.where(generator.random(400) < 0.3, 0.0, a)])
    table = paired_differences(["a", "same", "worse"], values).set_index(["method", "other"])
    assert table.loc[("a", "same"), ["difference", "p", "p_holm"]].tolist() == [0, 1, 1]
    better = table.loc[("a", "worse")]
    assert better.low > 0 and better.p < better.p_holm < 1e-6


def test_noise_is_called_a_difference_in_one_sweep_of_twenty():
    generator = np.random.default_rng(3)
    found = 0
    for _ in range(200):
        values = (generator.random((4, 128)) < 0.5).astype(float)
        p_values = [paired_p(values[i], values[j]) for i, j in combinations(range(4), 2)]
        found += min(holm(p_values)) < 0.05
    assert 1 <= found <= 20  # 10 expected at most; without Holm about 40


def test_the_pareto_front_is_what_nothing_beats_in_both():
    quality = [0.9, 0.8, 0.8, 0.95, 0.5, float("nan"), 0.9]
    kl = [3.0, 2.0, 2.5, 9.0, 2.0, 0.0, 3.0]
    assert on_pareto_front(quality, kl) == [True, True, False, True, False, False, True]
