"""Tables with one split: rows of some prompts are held out of it, and only rows with given values are used."""

import json

import pytest

from src.config.tables import Table
from src.config.validation import build_point
from src.data.tables import Hub
from src.errors import ConfigError
from src.planning.content import ContentPath
from src.planning.identity import DataInputs
from tests.support.configs import composed

TASKS = ("Math_CoT", "Coding")
COMMON = {"where": {"task": "Math_CoT"}, "validation_split": "train", "held_out": 0.2}


@pytest.fixture
def source(tmp_path):
    """Write tables in UltraInteract's layout: two pairs and a demonstration of each of 200 problems."""
    rows = {"sft": [], "preference": []}
    for n in range(400):
        problem, task = f"problem {n // 2}", TASKS[n // 2 % 2]
        trajectory = [{"from": "user", "value": problem}]
        rows["preference"].append({"task": task, "trajectory": trajectory, "chosen": f"right {n}", "rejected": "wrong"})
        if n % 2:
            rows["sft"].append({"task": task, "instruction": problem, "response": "right"})
    for name, table in rows.items():
        (tmp_path / name).mkdir()
        (tmp_path / name / "train.jsonl").write_text("\n".join(map(json.dumps, table)))
    tables = {
        "sft": Table("a", columns={"prompt": "instruction"}, **COMMON),
        "preference": Table("b", columns={"prompt": "trajectory"}, **COMMON),
    }
    return Hub(DataInputs("hub", 0, 64, 32, ContentPath.of(str(tmp_path), "dataset.path", kind="table"), **tables))


def test_held_out_prompts_are_the_same_in_every_table_and_rows_of_other_tasks_are_left_out(source):
    parts = {split: [pair.prompt.text for pair in source.pairs(split)] for split in ("train", "validation")}
    train, held_out = map(set, parts.values())
    assert not train & held_out and train | held_out == {f"problem {n}" for n in range(0, 200, 2)}
    assert 8 < len(held_out) < 35 and len(parts["train"]) == 2 * len(train), "about a fifth of the 100 prompts"
    assert {row.prompt.text for row in source.demonstrations()} == train


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("+dataset.sft.held_out=0.1", "dataset.sft.validation_split=.*: its splits are two: remove sft.held_out"),
        ("dataset.preference.validation_split=train", "both splits are one: set preference.held_out"),
    ],
)
def test_one_split_needs_a_share_and_two_have_none(override, message):
    with pytest.raises(ConfigError, match=message):
        build_point(composed("setup=llama32_3b_tldr", override))
