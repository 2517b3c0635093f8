"""Statistical tests against the p-values of the paper, computed from its table, and against scipy."""

from itertools import combinations

import numpy as np
import pandas as pd
import pytest
import yaml
from scipy.stats import bootstrap, norm

from sweeps.analysis.significance import (
    bootstrap_means,
    holm,
    interval,
    mean_difference_and_p,
    on_pareto_front,
    paired_differences,
    paired_p,
    pairwise_against_pointwise,
)
from tests.support.commands import ROOT

# arXiv 2502.01237, Table 2, as the report shows it: DPO, IPO, SimPO, ORPO (pairwise), then the pointwise methods.
PUBLISHED = {
    (table["setup"], row["method"]): row["values"]
    for table in yaml.safe_load((ROOT / "sweeps" / "report" / "published.yaml").read_text())
    if table["source"].endswith("Table 2")
    for row in table["rows"]
}
METHODS = ("dpo", "ipo", "simpo", "orpo", "apo_zero", "nca", "cal_dpo", "asft")
TABLE_2 = {
    f"{size} {name}": tuple(float(PUBLISHED[setup, method][column].split(" (")[0]) for method in METHODS)
    for size, setup in (("3B", "llama32_3b_uf"), ("8B", "llama31_8b_uf"))
    for column, name in enumerate(("LC", "WR", "AH"))
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
    mean_difference, p = mean_difference_and_p(values[:4], values[4:])
    assert mean_difference == pytest.approx(difference, abs=0.006)
    assert p == pytest.approx(splits / 70)
    # Enumerated directly: every choice of four of the eight.
    means = [np.mean(c) - (sum(values) - sum(c)) / 4 for c in combinations(values, 4)]
    assert sum(m >= mean_difference - 1e-9 for m in means) == splits and len(means) == 70


def test_many_methods_are_compared_by_random_splits_always_the_same(monkeypatch):
    values = np.random.default_rng(0).normal(size=16)
    groups = values[:8] + 0.5, values[8:]
    difference, exact = mean_difference_and_p(*groups)  # all 12,870 splits
    monkeypatch.setattr("sweeps.analysis.significance.MAX_SPLITS", 5000)
    random = mean_difference_and_p(*groups)
    assert random == mean_difference_and_p(*groups) and random[0] == difference
    assert random[1] != exact and random[1] == pytest.approx(exact, abs=0.03)
    # The whole family, 13 and 10 methods, has 1,144,066 splits.
    monkeypatch.undo()
    assert 0 < mean_difference_and_p(np.linspace(0, 1, 13), np.linspace(0, 1, 10) ** 2)[1] < 1


def test_kinds_are_compared_where_both_have_two_methods():
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


def test_holm_adjusts_stepwise_and_keeps_the_order():
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
    expected = bootstrap(
        (a, b),
        lambda x, y, axis: x.mean(axis) - y.mean(axis),
        paired=True,
        method="percentile",
        n_resamples=9999,
        vectorized=True,
        rng=np.random.default_rng(2),
    ).confidence_interval
    ours = interval(means[:, 0] - means[:, 1])
    assert ours == pytest.approx((expected.low, expected.high), abs=0.006)
    # Pairing narrows the interval: with independent prompts it would be wider.
    unpaired = 2 * norm.ppf(0.975) * np.sqrt(a.var() / 256 + b.var() / 256)
    assert ours[1] - ours[0] < 0.95 * unpaired


def test_equal_methods_do_not_differ_and_a_better_one_does():
    generator = np.random.default_rng(0)
    a = (generator.random(400) < 0.6).astype(float)
    values = np.array([a, a, np.where(generator.random(400) < 0.3, 0.0, a)])
    table = paired_differences(["a", "same", "worse"], values).set_index(["method", "other"])
    assert table.loc[("a", "same"), ["difference", "p", "p_holm"]].tolist() == [0, 1, 1]
    better = table.loc[("a", "worse")]
    assert better.low > 0 and better.p < better.p_holm < 1e-6


def test_false_positive_rate_on_noise_is_at_most_the_level():
    generator = np.random.default_rng(3)
    num_significant = 0
    for _ in range(200):
        values = (generator.random((4, 128)) < 0.5).astype(float)
        p_values = [paired_p(values[i], values[j]) for i, j in combinations(range(4), 2)]
        num_significant += min(holm(p_values)) < 0.05
    assert 1 <= num_significant <= 20  # 10 expected at most; without Holm about 40


def test_the_pareto_front_has_the_points_that_no_other_dominates():
    quality = [0.9, 0.8, 0.8, 0.95, 0.5, float("nan"), 0.9]
    kl = [3.0, 2.0, 2.5, 9.0, 2.0, 0.0, 3.0]
    assert on_pareto_front(quality, kl) == [True, True, False, True, False, False, True]
