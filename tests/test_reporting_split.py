"""Measurements of the selected points on the reporting split, from results in the format of a store."""

import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks.selection import coverage, simulate
from src.errors import ConfigError
from src.store.store import QUALITY_FILE, RESULT_SCHEMA
from sweeps.analysis import reporting_split
from sweeps.analysis.results import PromptQuality
from sweeps.analysis.selection import average_seeds, select_points
from tests.support.tables import points

NUM_PROMPTS = 200  # every other one is in the selection split


class Results:
    """A store of per-prompt qualities and the points.csv that goes with it."""

    def __init__(self, folder):
        self.folder, self.rows, self.values = folder, [], {}

    def add(self, values, **row):
        identity, values = str(len(self.rows)), np.asarray(values, float)
        selection = np.arange(NUM_PROMPTS) % 2 == 0
        self.values[identity] = values[~selection]
        stage = self.folder / "evaluate" / identity
        stage.mkdir(parents=True)
        quality = {
            "schema": RESULT_SCHEMA,
            "prompts": list(range(NUM_PROMPTS)),
            "values": values.tolist(),
            "selection": selection.tolist(),
        }
        (stage / QUALITY_FILE).write_text(json.dumps(quality))
        self.rows.append(
            row | {"quality_selection": values[selection].mean(), "quality_reporting": values[~selection].mean()}
        )

    @property
    def points(self):
        return points(*self.rows)

    @property
    def prompts(self):
        return PromptQuality(self.folder)


@pytest.fixture
def results(tmp_path):
    """DPO over four betas: the best, one that differs from it by noise only, a worse one, and beta = 1."""
    generator, results = np.random.default_rng(0), Results(tmp_path)
    difficulty = generator.random(NUM_PROMPTS)
    for beta, ability, kl in ((0.05, 0.78, 9.0), (0.1, 0.75, 4.0), (0.5, 0.5, 2.0), (1.0, 0.3, 1.0)):
        results.add(difficulty < ability, beta=beta, kl_sequence=kl)
    results.add(difficulty < 0.6, method="ipo", beta=0.1, kl_sequence=3.0)
    return results


def test_the_shortlist_has_the_points_not_significantly_different_from_the_best(results):
    best = select_points(average_seeds(results.points), "best", results.prompts).set_index("method")
    assert best.beta.to_dict() == {"dpo": 0.05, "ipo": 0.1}
    assert best.shortlist.to_dict() == {"dpo": 2, "ipo": 1}
    lowest_kl = select_points(average_seeds(results.points), "lowest_kl_in_shortlist", results.prompts)
    lowest_kl = lowest_kl.set_index("method")
    assert lowest_kl.beta.to_dict() == {"dpo": 0.1, "ipo": 0.1} and lowest_kl.loc["dpo", "kl_sequence"] == 4.0


def test_seeds_are_averaged_prompt_by_prompt(tmp_path):
    results = Results(tmp_path)
    for seed in (0, 1):
        results.add(np.arange(NUM_PROMPTS) % 3 == seed, beta=0.1, seed=seed)
    (values,) = results.prompts.reporting([["0", "1"]])
    assert set(values) == {0.0, 0.5} and values == pytest.approx((results.values["0"] + results.values["1"]) / 2)


def test_intervals_and_differences_are_those_of_the_reporting_prompts(results):
    best = select_points(average_seeds(results.points), "best", results.prompts)
    best = reporting_split.with_intervals(best, average_seeds(results.points), results.prompts).set_index("method")
    dpo, ipo = results.values["0"], results.values["4"]
    half = 1.96 * dpo.std(ddof=1) / np.sqrt(len(dpo))
    assert best.loc["dpo", "quality_reporting_low"] == pytest.approx(dpo.mean() - half, abs=0.015)
    assert best.loc["dpo", "quality_reporting_high"] == pytest.approx(dpo.mean() + half, abs=0.015)
    top = np.mean([results.values[i].mean() for i in "012"])
    assert best.loc["dpo", "top3_reporting"] == pytest.approx(top)
    assert np.isnan(best.loc["ipo", "top3_reporting"])
    (row,) = reporting_split.differences(best.reset_index(), results.prompts).to_dict("records")
    assert {row["method"], row["other"]} == {"dpo", "ipo"}
    assert abs(row["difference"]) == pytest.approx(abs(dpo.mean() - ipo.mean()))
    assert row["p"] == pytest.approx(ttest_rel(dpo, ipo).pvalue)


def test_the_gain_of_tuning_is_that_over_beta_1_and_over_trls_default(results):
    best = select_points(average_seeds(results.points), "best", results.prompts)
    gains = reporting_split.gains(average_seeds(results.points), best, results.prompts).set_index("against")
    dpo = gains[gains.method == "dpo"]
    assert dpo.loc["beta = 1", "difference"] == pytest.approx(results.values["0"].mean() - results.values["3"].mean())
    assert dpo.loc["beta = 1", "low"] > 0 and dpo.loc["beta = 1", "p"] < 1e-6
    assert dpo.loc["TRL's default", "beta"] == 0.1 and dpo.loc["TRL's default", "p"] > 0.05
    assert gains[gains.method == "ipo"].empty  # no point has beta = 1, and TRL's beta of IPO is defined differently


def test_wins_ties_and_losses_add_up_to_the_reporting_prompts_and_to_the_win_rate(tmp_path):
    results, third = Results(tmp_path), np.arange(NUM_PROMPTS) % 3
    results.add(third / 2, beta=0.1, metric="win_rate")
    for seed in (0, 1):
        results.add((third > seed).astype(float), method="ipo", beta=0.1, seed=seed, metric="win_rate")
    results.add(0.4 + third / 5, method="nca", beta=0.1, metric="win_rate")  # graded, as AlpacaEval's
    results.add(third / 2, method="orpo", beta=0.1, metric="reward_accuracy")  # without a judge
    best = select_points(average_seeds(results.points), "best", results.prompts)
    rows = reporting_split.verdicts(best, results.prompts).set_index("method")
    assert set(rows.index) == {"dpo", "ipo", "nca"}
    assert list(rows.win + rows.tie + rows.lose) == pytest.approx([100] * 3) and set(rows.prompts) == {NUM_PROMPTS // 2}
    counts = [sum(results.values["0"] == value) for value in (1, 0.5, 0)]
    assert list(rows.loc["dpo", ["win", "tie", "lose"]] * rows.prompts["dpo"] / 100) == pytest.approx(counts)
    by_seed = [results.values[seed].mean() for seed in "12"]
    assert rows.win["ipo"] == pytest.approx(100 * np.mean(by_seed)) and rows.seeds["ipo"] == 2
    win_rate = rows.win + rows.tie / 2 - 100 * rows.quality_reporting
    assert list(win_rate[["dpo", "ipo"]]) == pytest.approx([0, 0])
    assert abs(win_rate["nca"]) > 1  # the control: of graded verdicts the win rate is another number


def test_pareto_fronts_are_computed_per_method_and_per_kind(results):
    fronts = reporting_split.pareto_fronts(average_seeds(results.points)).set_index(["method", "beta"])
    assert fronts.loc["dpo", "front_of_method"].all()
    # DPO trades KL for quality at every step; IPO lies between two of its points in KL and is not dominated.
    assert fronts.front_of_kind.to_dict()[("ipo", 0.1)] and fronts.front_of_kind["dpo"].all()
    worse = results.points.assign(quality_reporting=lambda x: x.quality_reporting - 0.4 * (x.method == "ipo"))
    kind = reporting_split.pareto_fronts(average_seeds(worse)).set_index(["method", "beta"]).front_of_kind
    assert not kind[("ipo", 0.1)] and kind["dpo"].all()


def test_nothing_done_is_no_error(tmp_path):
    none = average_seeds(points({"beta": 0.1, "state": "failed"}).astype({"quality_selection": float}))
    prompts = PromptQuality(tmp_path)
    best = reporting_split.with_intervals(select_points(none, "best", prompts), none, prompts)
    assert best.empty and reporting_split.differences(best, prompts).empty
    assert reporting_split.gains(none, best, prompts).empty
    assert reporting_split.pareto_fronts(none).empty


def test_a_missing_quality_file_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"abc/quality.json: missing; run the sweep again"):
        PromptQuality(tmp_path).reporting([["abc"]])


def test_trls_defaults_are_trls():
    from dataclasses import fields

    from trl import DPOConfig
    from trl.experimental.cpo import CPOConfig

    from src.methods import METHODS

    defaults = [next(f.default for f in fields(config) if f.name == "beta") for config in (DPOConfig, CPOConfig)]
    assert [METHODS[name].trl_beta for name in ("dpo", "simpo")] == defaults
    # The loss types of DPOTrainer have its default; AlphaPO's and cDPO's trainer adds or takes other terms.
    assert {METHODS[name].trl_beta for name in METHODS} == {defaults[0], None}


def test_tuning_on_noise_has_no_gain_unless_selected_and_reported_on_the_same_prompts():
    gains = simulate(num_sweeps=60)
    assert coverage(gains["split"]) > 0.88 and abs(gains["split"][:, 0].mean()) < 0.02
    assert coverage(gains["naive"]) < 0.88 and gains["naive"][:, 0].mean() > 0.03
