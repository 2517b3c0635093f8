"""Each rule of the diagnosis: a case in which it fires, and one in which it does not."""

import numpy as np
import pandas as pd
import pytest

from sweeps.analysis.diagnosis.command import next_command
from sweeps.analysis.diagnosis.displacement import displacement
from sweeps.analysis.diagnosis.length import length_explains, win_rate_at_equal_length
from sweeps.analysis.diagnosis.noise import Pair, seed_noise, too_few_prompts
from sweeps.analysis.diagnosis.samples import beyond_sft, repeated_share, repetition, unfinished
from sweeps.analysis.diagnosis.training import DistanceMoved, diverged, loss_above_start, loss_at_start, sft_distance
from sweeps.analysis.diagnosis.tuning import GridPoint, border, over_optimized
from sweeps.recorded_command import variant_overrides
from tests.support.commands import ROOT

RNG = np.random.default_rng(0)
INITIAL = RNG.normal(-10, 2, 200)
CLOSER = {"beta": "1"}


def severity(finding):
    return finding and finding.severity


@pytest.mark.parametrize(
    ("change", "is_worse", "best_change", "expected"),
    [
        (-30.0, True, -5.0, "severe"),  # the log-prob has more than doubled, and samples are worse
        (-8.0, True, -5.0, "warning"),
        (-30.0, False, None, "note"),  # the best point: nothing suffers
        (-30.0, True, None, "severe"),  # the best point, but worse than the baseline
        (-30.0, True, -40.0, None),  # the best point lost more: this is not what is wrong here
        (-30.0, False, -5.0, None),
        (-0.5, True, 0.0, None),  # too little
        (+5.0, True, 6.0, None),
    ],
)
def test_displacement_fires_where_chosen_responses_lose_probability(change, is_worse, best_change, expected):
    final = INITIAL + change + RNG.normal(0, 1, len(INITIAL))
    finding = displacement(INITIAL, final, is_worse, best_change, 1e-3)
    assert severity(finding) == expected
    if finding:
        assert f"{(final - INITIAL).mean():.1f} nats" in finding.text and "100 % of 200" in finding.text
        assert finding.overrides["method"] == "dpop"


def test_a_few_pairs_that_lose_a_lot_are_no_displacement():
    final = INITIAL + np.where(np.arange(len(INITIAL)) < 60, -20.0, 0.5)
    assert (final - INITIAL).mean() < -5
    assert displacement(INITIAL, final, True, -1.0, 1e-3) is None


BEST = DistanceMoved(beta=0.05, lr=1e-3, kl=3.5, kl_error=0.1)
FLAT, FALLING = np.full(60, 0.693147), np.linspace(0.7, 0.4, 60)


@pytest.mark.parametrize(
    ("losses", "point", "best", "is_worse", "expected"),
    [
        (FLAT, DistanceMoved(1e-7, 1e-3, 0.7, 0.05), BEST, True, "warning"),  # beta is too small
        (FLAT, DistanceMoved(0.05, 1e-6, 0.1, 0.05), BEST, True, "warning"),  # lr is
        (FLAT, DistanceMoved(0.05, 1e-6, 0.01, 0.02), None, False, "severe"),  # the best point has not moved
        (FALLING, DistanceMoved(1e-7, 1e-3, 0.7, 0.05), BEST, True, None),
        (
            FLAT,
            DistanceMoved(1e-3, 1e-3, 3.4, 0.05),
            BEST,
            False,
            None,
        ),  # nearly linear, but the policy has moved
        (FLAT, DistanceMoved(1.0, 1e-3, 0.7, 0.05), BEST, True, None),  # a larger beta: regularized, not stuck
        (FLAT, BEST, None, False, None),
        (FLAT[:1], DistanceMoved(1e-7, 1e-3, 0.7, 0.05), BEST, True, None),
    ],
)
def test_a_loss_at_its_start_is_named_where_the_policy_has_not_moved(losses, point, best, is_worse, expected):
    finding = loss_at_start(losses, 1e-7, point, best, is_worse)
    assert severity(finding) == expected
    if finding:
        assert "still at its start after 60 steps" in finding.text
        assert finding.overrides == {"beta": f"{point.beta:g}", "lr": f"{3 * point.lr:g},{10 * point.lr:g}"}


def test_a_held_out_loss_above_the_start_is_found_beyond_noise():
    high, noisy = RNG.normal(2.0, 0.5, 200), RNG.normal(0.8, 3.0, 50)
    assert severity(loss_above_start(FLAT, high, True, 1.0, 1e-3)) == "warning"
    assert severity(loss_above_start(FLAT, high, False, 1.0, 1e-3)) == "note"
    assert loss_above_start(FLAT, noisy, True, 1.0, 1e-3) is None
    assert loss_above_start(FLAT, FALLING, True, 1.0, 1e-3) is None


def test_runs_that_diverged_are_found_among_those_that_failed():
    errors = [(0.1, 1e-2, "diverged at step 7: loss nan, gradient norm nan"), (0.1, 1e-3, "out of memory")]
    finding = diverged(errors, 5)
    assert finding.severity == "warning" and "1 of 5 runs diverged" in finding.text and "lr 0.01" in finding.text
    assert finding.overrides == {"beta": "0.1", "lr": "0.0033,0.001"}
    assert diverged(errors[:1], 1).severity == "severe", "most of them"
    assert diverged(errors[1:], 5) is None


@pytest.fixture(scope="module")
def demo_grids():
    """Return method -> its grid over beta in a finished sweep=demo."""
    points = pd.read_csv(ROOT / "benchmarks/recorded/demo_points.csv")
    return {
        method: [
            GridPoint(r.beta, r.quality_selection, r.quality_selection_se, r.reward_margin / r.beta)
            for r in rows.sort_values("beta").itertuples()
        ]
        for method, rows in points.groupby("method")
    }


def best_of(grid):
    return max(range(len(grid)), key=lambda i: (grid[i].quality, grid[i].value))


def test_a_best_beta_on_the_border_is_found_on_a_grid_cut_to_its_smallest_betas(demo_grids):
    cut = {method: grid[:3] for method, grid in demo_grids.items()}
    found = {method: border("beta", grid, best_of(grid)) for method, grid in cut.items()}
    assert severity(found["dpo"]) == "warning" and "largest of the 3" in found["dpo"].text
    assert found["dpo"].overrides == {"beta": "1,10"}, "the grid continues by its own ratio"
    assert severity(found["orpo"]) == "note", "the value beside it is the same within noise"


def test_no_best_beta_of_the_whole_demo_is_on_the_border(demo_grids):
    assert len(demo_grids) == 8
    assert not any(border("beta", grid, best_of(grid)) for grid in demo_grids.values())


def test_one_value_is_no_grid_and_the_smallest_one_is_continued_downwards(demo_grids):
    assert border("lr", demo_grids["dpo"][:1], 0) is None
    finding = border("lr", [GridPoint(1e-4, 0.9, 0.01, 1), GridPoint(1e-3, 0.5, 0.01, 1)], 0)
    assert finding.rule == "lr on the border" and finding.overrides == {"lr": "1e-06,1e-05"}


def test_quality_that_falls_while_margins_grow_is_found(demo_grids):
    grid = demo_grids["dpo"]
    finding, worst = over_optimized("beta", grid, best_of(grid))
    assert worst == 0.003 and "from beta 0.1 to 0.003" in finding.text
    assert 0.01 < float(finding.overrides["beta"]) < 0.1
    beyond = grid[best_of(grid) :]  # margins fall with quality
    assert over_optimized("beta", beyond, 0) is None


def test_a_gain_that_length_explains_is_told_beside_the_raw_one():
    lengths = RNG.normal(100, 50, 400)
    by_length = (RNG.random(400) < 1 / (1 + np.exp(-lengths / 30))).astype(float)
    finding = length_explains(by_length, lengths, 1e-3)
    assert finding.severity in ("warning", "severe") and "at equal length" in finding.text
    assert abs(win_rate_at_equal_length(by_length, lengths)[0] - 0.5) < 0.15
    real = (RNG.random(400) < 0.8).astype(float)  # whatever the length
    assert length_explains(real, lengths - 100, 1e-3) is None
    assert length_explains(1 - real, lengths, 1e-3) is None, "no gain"
    assert length_explains(real, np.zeros(400), 1e-3) is None


def test_repetition_is_measured_by_four_grams_and_compared_with_the_initial_model():
    assert repeated_share("a b c d e f g h") == 0 == repeated_share("a b") == repeated_share("")
    assert repeated_share("a b c d a b c d a b c d") == pytest.approx(1 - 4 / 9)
    bad, good = np.repeat([0.5, 0.0], [60, 40]), np.zeros(100)
    assert severity(repetition(bad, good, CLOSER)) == "severe" == severity(repetition(bad, None, CLOSER))
    assert severity(repetition(np.repeat([0.5, 0.0], [10, 90]), good, CLOSER)) == "warning"
    assert "0.0 % of the initial model's" in repetition(bad, good, CLOSER).text
    assert "initial model" not in repetition(bad, None, CLOSER).text
    assert repetition(bad, bad, CLOSER) is None, "as the initial model does"
    assert repetition(good, good, CLOSER) is None


def test_responses_that_do_not_end_are_compared_with_the_initial_model():
    assert severity(unfinished(0.1, 0.0, CLOSER)) == "warning"
    assert severity(unfinished(0.5, 0.0, CLOSER)) == "severe"
    assert unfinished(0.1, 0.09, CLOSER) is None
    assert unfinished(float("nan"), None, CLOSER) is None


def test_a_policy_farther_away_than_sft_went_is_found():
    distance = sft_distance(np.array([1.0] * 10 + [0.5] * 80 + [0.8] * 10))
    assert distance == pytest.approx(0.2)
    assert severity(beyond_sft(0.5, 0.01, distance, CLOSER)) == "warning"
    assert severity(beyond_sft(0.3, 0.01, distance, CLOSER)) == "note"
    assert beyond_sft(0.21, 0.01, distance, CLOSER) is None, "within noise"
    assert beyond_sft(0.5, 0.01, float("nan"), CLOSER) is None, "there was no SFT"


def test_a_significant_difference_within_the_noise_of_seeds_is_found():
    one, other = np.array([0.80, 0.90, 0.85]), np.array([0.83, 0.78, 0.90])
    finding = seed_noise(("DPO", "IPO"), (one, other), 0.01)
    assert finding.severity == "warning" and finding.overrides == {"seed": "0,1,2,3,4,5"}
    assert seed_noise(("DPO", "IPO"), (one, other), 0.2) is None, "nothing is claimed"
    assert seed_noise(("DPO", "IPO"), (one, other - 0.3), 0.01) is None
    assert seed_noise(("DPO", "IPO"), (one[:1], other[:1]), 0.01) is None


def test_of_equal_methods_with_two_seeds_few_are_told_apart():
    draws = RNG.normal(size=(2000, 2, 2))
    told = [seed_noise(("DPO", "IPO"), (one, other), 0.01) is None for one, other in draws]
    assert np.mean(told) < 0.05, "a normal distribution would tell 19 % apart"


def test_too_few_prompts_are_found_where_methods_are_tied():
    tied, told = Pair("IPO", 0.02, -0.02, 0.06, 0.4), Pair("NCA", 0.3, 0.25, 0.35, 1e-9)
    finding = too_few_prompts("DPO", [tied, told], 1, 256, "evaluation.num_prompts", 0.5)
    assert finding.severity == "note" and "do not tell DPO from IPO:" in finding.text
    assert finding.overrides == {"evaluation.num_prompts": "2048"}, "a difference of half the interval: four times 256"
    assert too_few_prompts("DPO", [tied], 1, 40, "evaluation.num_prompts", 0.5).severity == "warning"
    assert not too_few_prompts("DPO", [tied._replace(difference=1e-4)], 1, 256, "x", 0.5).overrides, "out of reach"
    assert not too_few_prompts("DPO", [tied], 1, 256, None, 0.5).overrides, "the data has no more"
    assert too_few_prompts("DPO", [told], 1, 256, "evaluation.num_prompts", 0.5) is None


def test_the_next_command_is_that_of_the_sweep_with_other_values_and_another_name():
    command = "python -m src.train -m +sweep=demo 'output_dir=/a b' method=all beta=grid sweep.name=x"
    assert next_command(command, "x", {"method": "dpo", "beta": "0.01,0.1"}) == (
        "python -m src.train -m +sweep=demo 'output_dir=/a b' method=dpo beta=0.01,0.1 sweep.name=x_dpo_beta"
    )
    for other in ("python -m sweeps.reproduce study.zip --points best", "synthetic"):
        assert next_command(other, "x", {"beta": "0.1"}) == "", "of another program"
    judged = "python -m src.train -m method=dpo sweep.judge_only=true"
    assert "judge_only" not in next_command(judged, "x", {"beta": "0.1"}), "what is proposed has to be trained"
    assert variant_overrides({"model.system_prompt": "be brief, be kind"}) == {
        "model.system_prompt": '"be brief, be kind"'
    }
    settings = {"model.name": "mini", "method.gamma_beta_ratio": None, "trainer.sft.lr": 0.1}
    assert variant_overrides(settings) == {"model": "mini", "method.gamma_beta_ratio": "null", "trainer.sft.lr": "0.1"}
