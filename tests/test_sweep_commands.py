"""A wrong argument of a `python -m sweeps.NAME` command is one line and exit code 2; names are shown as they are."""

import os

import pytest

from benchmarks.aggregation import make_sweep
from tests.support.commands import run_in_process

TOOLS = ("aggregate", "pack", "reproduce", "status", "cancel", "dashboard", "wandb_sync")


@pytest.fixture
def folder(tmp_path):
    return make_sweep(tmp_path, seeds=1, lrs=1, betas=1, methods=("dpo",), setup="[/red] :smile: [b]")


def assert_one_line(done, code=2):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and len(lines) == 1 and lines[0].startswith(("error: ", "failed: ")), done.stderr
    return lines[0]


@pytest.mark.parametrize("tool", TOOLS)
def test_a_wrong_argument_is_one_line(tool, tmp_path):
    (tmp_path / "file").write_text("x")
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "sweep" / "sweep.json").mkdir(parents=True)
    names = ["", "missing", "x" * 300, "a\nb", "\udcff", "file", "pipe", "sweep"]
    wrong = [[], ["--nothing"], *([tmp_path / name] for name in names), ["--watch=1", "x"]]
    for arguments in wrong:
        assert_one_line(run_in_process(*arguments, module=f"sweeps.{tool}"))


def test_help_is_help():
    for tool in TOOLS:
        done = run_in_process("--help", module=f"sweeps.{tool}")
        assert done.returncode == 0 and "usage: " in done.stdout


def test_results_are_not_written_into_a_file_or_where_nobody_may_write(folder, tmp_path):
    (tmp_path / "file").write_text("mine")
    done = run_in_process(folder.path, "--out", tmp_path / "file", module="sweeps.aggregate")
    assert "--out=" in assert_one_line(done) and (tmp_path / "file").read_text() == "mine"
    done = run_in_process(folder.path, "--out", tmp_path / "file" / "below", module="sweeps.aggregate")
    assert "is not a folder); choose another folder" in assert_one_line(done)
    folder.figures.write_text("a file where a folder should be")
    done = run_in_process(folder.path, module="sweeps.aggregate")
    assert str(folder.figures) in assert_one_line(done, 1)
    assert run_in_process(folder.path, "--out", tmp_path / "other", module="sweeps.aggregate").returncode == 0


def test_names_are_no_markup_in_a_status(folder):
    record = folder.read()
    for point in record["points"]:
        point |= {"label": "dpo [/red] :smile:", "state": "failed", "error": "[/b] :smile:", "identity": "gone"}
        point["stages"] |= {"evaluate": "gone"}
    folder.write(record)
    done = run_in_process(folder.path, module="sweeps.status")
    assert done.returncode == 1 and "dpo [/red] :smile:" in done.stdout and "[/b] :smile:" in done.stdout, done.stderr


@pytest.mark.parametrize("content", ["garbage", "{}", '{"schema": 1}'])
def test_a_status_shows_the_point_whose_result_is_damaged(content, folder):
    (point,) = folder.read()["points"]
    assert run_in_process(folder.path, module="sweeps.status").returncode == 0
    (folder.store.root / "evaluate" / point["identity"] / "result.json").write_text(content)
    done = run_in_process(folder.path, module="sweeps.status")
    assert done.returncode == 1 and "result.json" in done.stdout and not done.stderr
