"""Identities are equal exactly where results are equal."""

import pytest

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
