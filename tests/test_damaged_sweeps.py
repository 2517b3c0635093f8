"""One damaged file of a sweep, or of another one in its output_dir, is named in one line and stops nothing else."""

import json
import shutil

import pandas as pd
import pytest
import yaml

from benchmarks.aggregation import make_sweep
from src.errors import SweepFailed
from src.store.files import read_json, with_checksum, write_json
from src.store.integrity import DONE, describe_files
from src.store.store import QUALITY_FILE, RESULT_FILE, StageName
from src.store.sweep_folder import SweepFolder
from sweeps.aggregate import finalize
from tests.support.commands import SMALL, run_in_process

GARBAGE = {
    "garbage": b"gar\x00bage",
    "empty": b"",
    "not UTF-8": b'"\xff"',
    "{}": b"{}",
    "[]": b"[]",
    "schema 99": b'{"schema": 99}',
    "without keys": b'{"schema": 2}',
    "deep": b"[" * 100_000,
}


@pytest.fixture
def folder(tmp_path):
    """A sweep of three points of two methods, all done."""
    return make_sweep(tmp_path, seeds=1, lrs=1, betas=3, methods=("dpo", "asft"))


def result_dir(folder, number):
    return folder.store.dir(StageName("evaluate", folder.read()["points"][number]["identity"]))


def publish(stage):
    write_json(stage / DONE, with_checksum({"identity": stage.name, "seconds": 1.0, "files": describe_files(stage)}))


def test_a_changed_digit_of_a_result_is_damage(folder):
    result = result_dir(folder, 0) / RESULT_FILE
    before = result.read_text()
    result.write_text(before.replace('"seconds": 1.0', '"seconds": 2.0'))
    assert before != result.read_text() and len(before) == len(result.read_text())
    assert_one_line(run_in_process(folder.path, module="sweeps.aggregate"), 1, "run the sweep again to remake it")
    publish(result.parent)
    assert run_in_process(folder.path, module="sweeps.aggregate").returncode == 0, "the control"


def assert_one_line(done, code, *texts):
    lines = done.stderr.strip().splitlines()
    assert done.returncode == code and len(lines) == 1, done.stderr
    assert all(text in lines[0] for text in texts), lines


@pytest.mark.parametrize("content", GARBAGE.values(), ids=GARBAGE)
def test_a_damaged_record_is_named_with_the_cure_by_every_command(content, folder):
    assert run_in_process(folder.path, module="sweeps.status").returncode == 0, "the control: it is read"
    folder.record.write_bytes(content)
    for tool, *options in (["aggregate"], ["status"], ["cancel"], ["dashboard", "--local"], ["wandb_sync"]):
        assert_one_line(
            run_in_process(folder.path, *options, module=f"sweeps.{tool}"), 2, str(folder.record), "away and run"
        )
    same = run_in_process("-m", *SMALL, f"sweep.name={folder.name}", f"output_dir={folder.output_dir}")
    assert_one_line(same, 2, str(folder.record), "away and run")


@pytest.mark.parametrize("change", [{"points": [1]}, {"points": [{}]}, {"studies": None}, {"search": {"rung": 1}}])
def test_a_record_that_lacks_an_entry_is_damaged(change, folder):
    folder.record.write_text(json.dumps(folder.read() | change))
    assert_one_line(run_in_process(folder.path, module="sweeps.aggregate"), 2, f"{folder.record}: damaged, ")


def test_a_method_that_is_unknown_here_is_named(folder):
    record = folder.read()
    record["points"][0]["method"] = "mine"
    folder.record.write_text(json.dumps(record))
    assert_one_line(run_in_process(folder.path, module="sweeps.aggregate"), 2, "points[0] has an unknown method, mine")


@pytest.mark.parametrize(
    ("content", "published"),
    [(b"garbage", False), (b"{}", True), (b'{"schema": 2, "quality": "x", "values": []}', True)],
)
def test_a_damaged_result_fails_its_point_alone(content, published, folder):
    """published: whether the damage has the digest of DONE, so that only its content shows it."""
    damaged = [result_dir(folder, 0) / RESULT_FILE, result_dir(folder, 3) / QUALITY_FILE]
    for path in damaged:
        path.write_bytes(content)
        if published:
            publish(path.parent)
    with pytest.raises(SweepFailed, match="2 of 6 points failed"):
        finalize(folder.path, {})
    points, table = folder.read()["points"], pd.read_csv(folder.points_csv)
    expected = ["failed", "done", "done"] * 2
    assert [point["state"] for point in points] == list(table.state) == expected
    for path, number in zip(damaged, (0, 3), strict=True):
        assert all(
            str(path) in text for text in (points[number]["error"], table.error[number], folder.report.read_text())
        )
    assert set(yaml.safe_load(folder.best_yaml.read_text())["synthetic"]) == {"dpo", "asft"}
    again = run_in_process(folder.path, module="sweeps.aggregate")
    assert_one_line(again, 1, "(1 more points have damaged results); run the sweep again")


def test_a_deleted_result_is_a_point_that_was_not_run(folder):
    shutil.rmtree(result_dir(folder, 0))
    done = run_in_process(folder.path, module="sweeps.aggregate")
    assert done.returncode == 0 and "to do: " in done.stdout and "not run" in done.stdout, done.stderr
    assert list(pd.read_csv(folder.points_csv).state) == ["to do"] + ["done"] * 5
    shutil.rmtree(folder.store.root / "evaluate")
    assert run_in_process(folder.path, module="sweeps.aggregate").returncode == 0
    assert "No point is done" in folder.report.read_text()


@pytest.fixture
def with_weights(folder):
    """The same with keep_checkpoints=best, and the weights of its models."""
    record = folder.read()
    folder.write(record | {"keep_checkpoints": "best"})
    for point in record["points"]:
        align = folder.store.dir(StageName("align", point["stages"]["align"]))
        align.mkdir(parents=True)
        (align / "model.safetensors").write_text("weights")
        (align / "DONE").write_text("{}")
        evaluate = folder.store.dir(StageName("evaluate", point["identity"]))
        (evaluate / "stage.json").write_text(json.dumps({"upstream": {"align": align.name}}))
    return folder


def num_models(folder):
    return len(list(folder.store.root.glob("align/*/model.safetensors")))


@pytest.mark.parametrize("content", [b"\xff", b"- a\n- b\n", b"a: [1]\n", b"a: {dpo: 1}\n", b"{", b"a"])
def test_with_an_unreadable_best_yaml_of_another_sweep_no_model_is_removed(content, with_weights, capfd):
    other = SweepFolder(with_weights.store.sweeps / "other")
    other.path.mkdir()
    other.best_yaml.write_bytes(content)
    finalize(with_weights.path, {})
    assert with_weights.read()["state"] == "done" and num_models(with_weights) == 6
    error = capfd.readouterr().err
    assert error.count("warning: ") == 1 and str(other.best_yaml) in error and len(error.strip().splitlines()) == 1


def test_with_readable_ones_the_models_that_none_selected_are_removed(with_weights):
    other = SweepFolder(with_weights.store.sweeps / "other")
    other.path.mkdir()
    other.best_yaml.write_text("# a sweep without results\n{}\n")
    finalize(with_weights.path, {})
    assert num_models(with_weights) == 2


def test_with_a_damaged_description_of_a_selected_result_no_model_is_removed(with_weights, capfd):
    identity = with_weights.read()["points"][0]["identity"]
    other = SweepFolder(with_weights.store.sweeps / "other")
    other.path.mkdir()
    other.best_yaml.write_text(yaml.safe_dump({"s": {"dpo": {"identities": [identity]}}}))
    (with_weights.store.dir(StageName("evaluate", identity)) / "stage.json").write_text("{}")
    finalize(with_weights.path, {})
    assert num_models(with_weights) == 6 and "stage.json: damaged" in capfd.readouterr().err


def test_a_record_of_jobs_of_another_sweep_or_version_does_not_stop_a_sweep(folder, capfd):
    for number, content in enumerate((b"", b"{}", b"[]", b'{"schema": 2}', b'{"schema": 2, "tasks": [1]}')):
        record = folder.store.sweeps / "other" / "jobs" / str(number) / "submission.json"
        record.parent.mkdir(parents=True)
        record.write_bytes(content)
    finalize(folder.path, {})
    assert folder.read()["state"] == "done" and read_json(folder.record)["finished"]
    assert capfd.readouterr().err.count("submission.json") == 5
    assert run_in_process(folder.path, module="sweeps.status").returncode == 0
