"""Selected on one split, averaged over seeds, reported on the other."""

import pytest

from sweeps.analysis.selection import average_seeds, best_points
from tests.support.tables import points


def test_selection_split_decides_and_reporting_split_is_reported():
    table = points(
        {"beta": 0.1, "quality_selection": 0.9, "quality_reporting": 0.6},
        {"beta": 1.0, "quality_selection": 0.8, "quality_reporting": 0.95},
    )
    best = best_points(average_seeds(table)).iloc[0]
    assert (best.beta, best.quality_reporting) == (0.1, 0.6)


def test_a_lucky_seed_does_not_win():
    table = points(
        *[{"beta": 0.1, "seed": s, "quality_selection": q} for s, q in enumerate((0.90, 0.95, 0.80))],
        *[{"beta": 0.3, "seed": s, "quality_selection": q} for s, q in enumerate((0.94, 0.94, 0.94))],
    )
    best = best_points(average_seeds(table)).iloc[0]
    assert (best.beta, best.seeds, best.identities) == (0.3, 3, ["3", "4", "5"])
    average = average_seeds(table).iloc[0]
    assert average.quality_selection == pytest.approx(0.8833, abs=1e-4)
    assert average.quality_selection_se == pytest.approx(0.0441, abs=1e-4)


def test_failed_points_and_those_without_a_number_are_never_selected():
    table = points(
        {"beta": 0.1, "quality_selection": 0.99, "state": "failed"},
        {"beta": 0.2, "quality_selection": float("nan")},
        {"beta": 0.3, "quality_selection": 0.4},
    )
    assert list(best_points(average_seeds(table)).beta) == [0.3]
    assert best_points(average_seeds(table.iloc[:2])).empty


def test_variants_are_separate_studies():
    table = points(
        {"beta": 0.1, "variant": "method.gamma_beta_ratio=0.3", "quality_selection": 0.9},
        {"beta": 1.0, "variant": "method.gamma_beta_ratio=0.5", "quality_selection": 0.8},
    )
    assert len(best_points(average_seeds(table))) == 2
