"""Identities are equal exactly where results are equal."""

import pytest

from src.planning import stage
from tests.support.configs import identities

ALL = {"sft", "reference", "align", "baseline", "generate", "evaluate"}


@pytest.mark.parametrize(
    ("override", "changed"),
    [
        ("beta=0.2", {"align", "generate", "evaluate"}),
        ("lr=2e-3", {"align", "generate", "evaluate"}),
        ("trainer.align.epochs=2", {"align", "generate", "evaluate"}),
        ("init.sft_weight=0.1", {"align", "generate", "evaluate"}),
        ("evaluation.generation.temperature=0.5", {"baseline", "generate", "evaluate"}),
        ("evaluation.generation.samples_per_prompt=2", {"baseline", "generate", "evaluate"}),
        ("evaluation.generation.samples_per_prompt=1", set()),
        ("evaluation.split_seed=1", {"evaluate"}),
        ("dataset.train_size=100", ALL - {"sft", "baseline"}),
        ("trainer.align.max_steps=10", {"reference", "align", "generate", "evaluate"}),
        (
            "trainer.align.max_steps=62",
            {"reference", "align", "generate", "evaluate"},
        ),  # the last 16 of 2000 are not read
        ("trainer.align.max_steps=63", {"align", "generate", "evaluate"}),  # 63 x 32 pairs: all of 2000
        ("trainer.sft.max_steps=10", ALL),
        ("trainer.sft.lr=2e-3", ALL),
        ("dataset.seed=1", ALL),
        ("seed=1", ALL),
        ("engine=fsdp", ALL),
        ("trainer.align.stop_fraction=0.5", {"align", "generate", "evaluate"}),
        ("trainer.align.stop_fraction=1", set()),
        ("sweep.search=successive_halving", set()),
        ("trainer.max_tokens_per_micro_batch=100", set()),
        ("trainer.checkpoint_minutes=0", set()),
        ("evaluation.generation.batch_size=1", set()),
        ("engine.cpu_threads=2", set()),
        ("tracking=wandb", set()),
        ("output_dir=elsewhere", set()),
    ],
)
def test_a_change_reaches_exactly_the_stages_that_depend_on_it(override, changed):
    before, after = identities(), identities(override)
    assert {role for role in before if before[role] != after[role]} == changed


def test_methods_share_what_comes_before_them():
    dpo, ipo, orpo = (identities(f"method={m}") for m in ("dpo", "ipo", "orpo"))
    assert dpo["reference"] == ipo["reference"] and "reference" not in orpo
    assert dpo["sft"] == orpo["sft"] and dpo["baseline"] == orpo["baseline"]
    assert len({x["align"] for x in (dpo, ipo, orpo)}) == 3


def test_init_base_is_judged_against_the_same_baseline():
    sft, base = identities(), identities("init=base", "beta=0.1", "lr=1e-3")
    assert sft["baseline"] == base["baseline"] and sft["align"] != base["align"]
    assert sft["reference"] != base["reference"]


def test_identities_of_a_default_point_are_those_that_stores_have(monkeypatch):
    """What a field that is added to the inputs would change, unless it is an `added_field`."""
    versions = {"sft": 11, "reference": 10, "align": 10, "generate": 10, "evaluate": 6}
    monkeypatch.setattr(stage, "VERSIONS", versions)  # a new version of a stage is meant to change them
    known = {
        "sft": "23a970ee7373546cf64c987f",
        "reference": "2b68b35b32e78672512b7aca",
        "align": "118f4a71ae8571b0a13e08db",
        "baseline": "52f0c1193e577675e91ae791",
        "generate": "639af204eb0019b481e66f63",
        "evaluate": "1e925bbb9fe5159455e97a4b",
    }
    assert identities("method=dpo", "beta=0.1", "lr=1e-6") == known
    assert identities("method=simpo", "beta=0.1", "lr=1e-6")["align"] == "435f3c0382f0bb367dbfe211"


def test_a_score_is_hashed_where_it_is_not_the_method_s_own():
    dpo = identities("method=dpo")
    assert identities("method=dpo", "method.score=log_ratio") == dpo
    mean = identities("method=dpo", "method.score=mean_log_ratio")
    assert {role for role in dpo if dpo[role] != mean[role]} == {"align", "generate", "evaluate"}
