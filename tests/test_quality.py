"""mini TL;DR at full size shows the effect of beta."""

import pandas as pd
import pytest

from tests.support.commands import train


@pytest.mark.slow
def test_dpo_has_an_inverted_u_over_beta_and_a_falling_kl(tmp_path):
    train("-m", "method=dpo", "beta=0.003,0.1,3", f"output_dir={tmp_path}", "sweep.name=quality")
    points = pd.read_csv(tmp_path / "sweeps" / "quality" / "points.csv")
    weak, right, strong = points.quality
    assert right >= 0.85 and weak <= right - 0.08 and strong <= right - 0.08
    assert points.kl_sequence.is_monotonic_decreasing and points.kl_sequence.iloc[0] > 4 * points.kl_sequence.iloc[1]
    assert (points.kl_sequence > 3 * points.kl_sequence_se).all()
