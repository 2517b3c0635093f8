"""What the reporting prompts say of what the selection prompts chose, from results written as a sweep writes them."""

import json

import numpy as np
import pytest
from scipy.stats import ttest_rel

from benchmarks.selection import coverage, simulate
from src.errors import ConfigError
from src.store.store import QUALITY_FILE
from sweeps.analysis import reporting_split as held_out
from sweeps.analysis.per_prompt import PromptQuality
from sweeps.analysis.selection import chosen_points, over_seeds
from tests.support.tables import points

PROMPTS = 200  # every other one selects


class Results:
    """A store of per-prompt qualities and the points.csv that goes with it."""

    def __init__(self, folder):
        self.folder, self.rows, self.values = folder, [], {}

    def add(self, values, **row):
        identity, values = str(len(self.rows)), np.asarray(values, float)
        selects = np.arange(PROMPTS) % 2 == 0
        self.values[identity] = values[~selects]
        stage = self.folder / "evaluate" / identity
        stage.mkdir(parents=True)
        found = {"prompts": list(range(PROMPTS)), "values": values.tolist(), "selects": selects.tolist()}
        (stage / QUALITY_FILE).write_text(json.dumps(found))
        self.rows.append(
            row | {"quality_selection": values[selects].mean(), "quality_reporting": values[~selects].mean()}
        )

    @property
    def points(self):
        return points(*self.rows)

    @property
    def prompts(self):
        return PromptQuality(self.folder)


@pytest.fixture
def results(tmp_path):
    """DPO over four betas: a clear best, one as good prompt by prompt but for noise, a worse one, and beta = 1."""
    generator, made = np.random.default_rng(0), Results(tmp_path)
    difficulty = generator.random(PROMPTS)
    for beta, ease, kl in ((0.05, 0.78, 9.0), (0.1, 0.75, 4.0), (0.5, 0.5, 2.0), (1.0, 0.3, 1.0)):
        made.add(difficulty < ease, beta=beta, kl_sequence=kl)
    made.add(difficulty < 0.6, method="ipo", beta=0.1, kl_sequence=3.0)
    return made


def test_the_shortlist_is_what_the_selection_prompts_cannot_tell_from_the_best(results):
    best = chosen_points(over_seeds(results.points), "best", results.prompts).set_index("method")
    assert best.beta.to_dict() == {"dpo": 0.05, "ipo": 0.1}
    assert best.shortlist.to_dict() == {"dpo": 2, "ipo": 1}
    nearer = chosen_points(over_seeds(results.points), "lowest_kl_in_shortlist", results.prompts).set_index("method")
    assert nearer.beta.to_dict() == {"dpo": 0.1, "ipo": 0.1} and nearer.loc["dpo", "kl_sequence"] == 4.0


def test_seeds_are_averaged_prompt_by_prompt(tmp_path):
    made = Results(tmp_path)
    for seed in (0, 1):
        made.add(np.arange(PROMPTS) % 3 == seed, beta=0.1, seed=seed)
    (values,) = made.prompts.reporting([["0", "1"]])
    assert set(values) == {0.0, 0.5} and values == pytest.approx((made.values["0"] + made.values["1"]) / 2)


def test_intervals_and_differences_are_those_of_the_reporting_prompts(results):
    best = chosen_points(over_seeds(results.points), "best", results.prompts)
    best = held_out.with_intervals(best, over_seeds(results.points), results.prompts).set_index("method")
    own, other = results.values["0"], results.values["4"]
    half = 1.96 * own.std(ddof=1) / np.sqrt(len(own))
    assert best.loc["dpo", "quality_reporting_low"] == pytest.approx(own.mean() - half, abs=0.015)
    assert best.loc["dpo", "quality_reporting_high"] == pytest.approx(own.mean() + half, abs=0.015)
    top = np.mean([results.values[i].mean() for i in "012"])
    assert best.loc["dpo", "top_reporting"] == pytest.approx(top)
    assert np.isnan(best.loc["ipo", "top_reporting"])
    (row,) = held_out.differences(best.reset_index(), results.prompts).to_dict("records")
    assert {row["method"], row["other"]} == {"dpo", "ipo"}
    assert abs(row["difference"]) == pytest.approx(abs(own.mean() - other.mean()))
    assert row["p"] == pytest.approx(ttest_rel(own, other).pvalue)


def test_the_gain_of_tuning_is_that_over_beta_1_and_over_trls_default(results):
    best = chosen_points(over_seeds(results.points), "best", results.prompts)
    gains = held_out.gains(over_seeds(results.points), best, results.prompts).set_index("against")
    dpo = gains[gains.method == "dpo"]
    assert dpo.loc["beta = 1", "difference"] == pytest.approx(results.values["0"].mean() - results.values["3"].mean())
    assert dpo.loc["beta = 1", "low"] > 0 and dpo.loc["beta = 1", "p"] < 1e-6
    assert dpo.loc["TRL's default", "beta"] == 0.1 and dpo.loc["TRL's default", "p"] > 0.05
    assert gains[gains.method == "ipo"].empty  # its sweep has no beta = 1, and TRL's beta means something else


def test_fronts_are_of_a_method_and_of_its_kind(results):
    fronts = held_out.fronts(over_seeds(results.points)).set_index(["method", "beta"])
    assert fronts.loc["dpo", "front_of_method"].all()
    # Each step of DPO costs KL and gives quality; IPO, between two of them in KL, is above neither's line.
    assert fronts.front_of_kind.to_dict()[("ipo", 0.1)] and fronts.front_of_kind["dpo"].all()
    worse = results.points.assign(quality_reporting=lambda x: x.quality_reporting - 0.4 * (x.method == "ipo"))
    kind = held_out.fronts(over_seeds(worse)).set_index(["method", "beta"]).front_of_kind
    assert not kind[("ipo", 0.1)] and kind["dpo"].all()


def test_nothing_done_is_no_error(tmp_path):
    none = over_seeds(points({"beta": 0.1, "state": "failed"}).astype({"quality_selection": float}))
    prompts = PromptQuality(tmp_path)
    best = held_out.with_intervals(chosen_points(none, "best", prompts), none, prompts)
    assert best.empty and held_out.differences(best, prompts).empty and held_out.gains(none, best, prompts).empty
    assert held_out.fronts(none).empty


def test_a_result_of_an_earlier_version_is_named(tmp_path):
    with pytest.raises(ConfigError, match=r"abc/quality.json is not there: a result of an earlier version; run"):
        PromptQuality(tmp_path).reporting([["abc"]])


def test_trls_defaults_are_trls():
    from dataclasses import fields

    from trl import DPOConfig
    from trl.experimental.cpo import CPOConfig

    from src.methods import METHODS

    defaults = [next(f.default for f in fields(config) if f.name == "beta") for config in (DPOConfig, CPOConfig)]
    assert [METHODS[name].trl_beta for name in ("dpo", "simpo")] == defaults
    assert {METHODS[name].trl_beta for name in ("apo_zero", "nca")} == {defaults[0]}  # loss types of DPOTrainer


def test_tuning_on_noise_gains_nothing_and_choosing_and_reporting_on_the_same_prompts_says_otherwise():
    found = simulate(sweeps=60)
    assert coverage(found["split"]) > 0.88 and abs(found["split"][:, 0].mean()) < 0.02
    assert coverage(found["naive"]) < 0.88 and found["naive"][:, 0].mean() > 0.03
