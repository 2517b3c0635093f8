"""The comparison of a demo run with the recorded one finds changed, missing and shifted win rates."""

import pandas as pd
import pytest

from benchmarks.demo_figures import RECORDED, differences, violations


@pytest.fixture
def recorded():
    table = pd.read_csv(RECORDED)
    assert len(table) == 48
    return table


def check(points, recorded):
    return violations(differences(points, recorded))


def test_equal_figures_pass_in_any_order(recorded):
    assert check(recorded.iloc[::-1], recorded) == []


def test_one_changed_sample_passes(recorded):
    one = recorded.assign(quality=recorded.quality.where(recorded.index != 3, recorded.quality + 0.002))
    assert check(one, recorded) == []


def test_a_win_rate_beyond_two_standard_errors_is_a_violation(recorded):
    changed = recorded.copy()
    changed.loc[3, "quality"] += 2.1 * changed.loc[3, "quality_se"]
    assert check(changed, recorded) == ["1 win rates differ by more than 2 standard errors"]


def test_a_common_shift_is_a_violation(recorded):
    (line,) = check(recorded.assign(quality=recorded.quality - 0.0055), recorded)
    assert line == "the mean difference -0.0055 is not below 0.005"
    assert check(recorded.assign(quality=recorded.quality - 0.0045), recorded) == []


def test_missing_and_failed_points_are_violations(recorded):
    assert check(recorded.iloc[1:], recorded) == ["1 points are missing in one of the two"]
    failed = recorded.assign(quality=recorded.quality.where(recorded.index != 3))
    assert check(failed, recorded) == ["1 points are missing in one of the two"]
