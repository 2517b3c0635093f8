"""Keys and values of earlier versions, given anywhere, are one line that names the new ones."""

import re

import pytest
import yaml

from src.config.renamed_keys import RENAMED_KEYS, RENAMED_VALUES, check_renamed, rename_hint
from src.errors import ConfigError
from tests.support.commands import run_in_process


def refusal(folder, *arguments):
    """Return the one line that a command is refused with, and check that nothing was written."""
    done = run_in_process(*arguments, f"output_dir={folder}/outputs")
    assert done.returncode == 2, done.stderr
    (line,) = done.stderr.strip().splitlines()
    assert line.startswith("error: ") and not (folder / "outputs").exists()
    return line


@pytest.mark.parametrize("prefix", ["", "+", "++"])
@pytest.mark.parametrize("key", RENAMED_KEYS)
def test_an_old_key_is_refused_with_the_new_name(key, prefix):
    with pytest.raises(
        ConfigError, match=re.escape(f"{prefix}{key}=1: the key {key} is called {RENAMED_KEYS[key]} now")
    ):
        check_renamed(["beta=1", f"{prefix}{key}=1"])


@pytest.mark.parametrize("value", RENAMED_VALUES)
def test_an_old_value_is_refused_with_the_new_one(value):
    with pytest.raises(ConfigError, match=re.escape(f"{value}: this is {RENAMED_VALUES[value]} now")):
        check_renamed(["beta=1", value])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["++keep=all"], "++keep=all: the key keep is called keep_checkpoints now"),
        (["-m", "beta=0.1,1", "engine.threads=1,2"], "the key engine.threads is called engine.cpu_threads now"),
        (["~dataset.preference.distinct"], "the key dataset.preference.distinct is called"),
        (["-m", "beta=0.1,1", "tracking.wandb=true"], "tracking.wandb=true: this is tracking.wandb.enabled=true now"),
    ],
)
def test_a_command_says_so_in_one_line_and_writes_nothing(arguments, message, tmp_path):
    assert message in refusal(tmp_path, *arguments)


@pytest.mark.parametrize("key", ["hydra.launcher.kinds.point.timeout_min", "trainer.align.schedule.x"])
def test_a_key_below_an_old_one_is_refused_with_its_new_place(key, tmp_path):
    new = key.replace("point", "align").replace("schedule", "lr_scheduler_type")
    assert f"is called {new} now" in refusal(tmp_path, f"{key}=1")


@pytest.mark.parametrize("name", ["single_bf16", "ddp_bf16"])
def test_an_old_engine_in_a_users_yaml_or_a_sweep_is_refused_with_the_new_name(name, tmp_path):
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text(
        f"# @package _global_\ndefaults:\n  - override /engine: {name}\n  - _self_\n"
    )
    assert "this is engine=fsdp now" in refusal(tmp_path, "--config-dir", str(tmp_path), "+sweep=mine")
    assert "this is engine=fsdp now" in refusal(tmp_path, "-m", f"engine={name},single", "beta=0.1")


@pytest.mark.parametrize("key", [key for key in RENAMED_KEYS if key != "hydra.launcher.kinds.point"])
def test_an_old_key_in_a_users_yaml_is_refused_with_the_new_name(key, tmp_path):
    sweep = ["-m", "beta=0.1,1"] if key.startswith("hydra.launcher") else []  # a single run has no launcher
    node = 1
    for name in reversed(key.split(".")):
        node = {name: node}
    (tmp_path / "sweep").mkdir()
    (tmp_path / "sweep" / "mine.yaml").write_text("# @package _global_\n" + yaml.safe_dump(node))
    table = ["setup=llama32_3b_tldr"] if key.startswith("dataset") else []
    line = refusal(tmp_path, "--config-dir", str(tmp_path), *sweep, *table, "+sweep=mine")
    assert line.endswith(f"the key {key} is called {RENAMED_KEYS[key]} now")


def test_new_keys_and_other_errors_get_no_hint(tmp_path):
    assert rename_hint("Key 'nosuch' not in 'Point' at key trainer.nosuch") == ""
    for new in RENAMED_KEYS.values():
        assert rename_hint(f"something else is wrong at key {new}") == ""
    assert run_in_process("keep_checkpoints=best", "dry_run=true", f"output_dir={tmp_path}").returncode == 0
