"""Tables with one split: rows of some prompts are held out of it, and only rows with given values are used."""

import json
from dataclasses import replace
from pathlib import Path

import pytest

from src.config.tables import Table
from src.config.validation import build_point
from src.data.rows import Prompt
from src.data.tables import Hub, is_held_out
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


def test_a_system_message_does_not_decide_what_is_held_out():
    def prompt(number, *system):
        return Prompt((*system, {"role": "user", "content": f"problem {number}"}))

    system = {"role": "system", "content": "Be brief."}
    held_out = [is_held_out(prompt(number, system), 0.2) for number in range(200)]
    assert held_out == [is_held_out(prompt(number), 0.2) for number in range(200)] and 20 < sum(held_out) < 60


def test_a_local_copy_is_checked_by_the_first_rows_that_where_lets_through(source):
    """The first rows of the table are of another task and cannot be parsed."""
    for name in ("sft", "preference"):
        file = Path(source.data.path.location, name, "train.jsonl")
        odd = [{"task": "Coding", "trajectory": [], "instruction": None, "chosen": 1}] * 3
        file.write_text("\n".join([*map(json.dumps, odd), file.read_text()]))
    source.check()
    assert [row.prompt.text for row in source.sample("train", 3)[0]] == ["problem 0", "problem 0", "problem 2"]

    def other(**where):
        tables = {name: replace(getattr(source.data, name), where=where) for name in ("sft", "preference")}
        return Hub(replace(source.data, **tables))

    with pytest.raises(ConfigError, match="train, row 0: "):
        other(task="Coding").check()
    with pytest.raises(ConfigError, match=r"preference/train: the split has no rows with dataset.preference.where="):
        other(task="Poems").check()
    with pytest.raises(ConfigError, match=r"dataset.preference.where: .*/train has no column 'kind'"):
        other(kind="Coding").check()


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
