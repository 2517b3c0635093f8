"""`python -m sweeps.pack DIR` writes one file with all that results are made of, without models and secrets."""

import hashlib
import json
import os
import shutil
import zipfile
from html import escape
from pathlib import Path

import pytest

from benchmarks.aggregation import make_sweep
from src.errors import ConfigError
from src.store.integrity import WEIGHTS_REMOVED
from src.store.sweep_folder import SweepFolder
from sweeps.study.archive import STUDY_FILE, unpack, write_archive
from sweeps.study.secret_check import SecretCheck
from tests.support.commands import run_in_process
from tests.support.studies import edited
from tests.test_sweep_commands import assert_one_line


def pack(*arguments):
    return run_in_process(*arguments, module="sweeps.pack")


@pytest.fixture(scope="module")
def sweep(local_four_points):
    return SweepFolder(local_four_points / "sweeps" / "four")


@pytest.fixture(scope="module")
def study(sweep, tmp_path_factory):
    path = tmp_path_factory.mktemp("study") / "study.zip"
    done = pack(sweep.path, "--out", path)
    assert done.returncode == 0, done.stderr
    assert hashlib.sha256(path.read_bytes()).hexdigest() in done.stdout
    return path


@pytest.fixture
def copied(sweep, tmp_path):
    """A copy of the sweep to be damaged."""
    shutil.copytree(sweep.output_dir, tmp_path / "copy", ignore=shutil.ignore_patterns("*.safetensors", ".work"))
    return SweepFolder(tmp_path / "copy" / "sweeps" / sweep.name)


def test_a_study_has_every_result_and_no_model(study, sweep):
    with zipfile.ZipFile(study) as archive:
        names, described = set(archive.namelist()), json.loads(archive.read(STUDY_FILE))
        for name, content in described["files"].items():
            assert hashlib.sha256(archive.read(name)).hexdigest() == content["sha256"], name
    assert names == {*described["files"], STUDY_FILE}
    for path in sweep.output_dir.glob("store/*/*/*"):
        is_result = path.suffix in (".json", ".jsonl") and "token" not in str(path) and "config.json" not in path.name
        is_result |= path.name in ("DONE", "run_config.json")
        assert (path.relative_to(sweep.output_dir).as_posix() in names) == is_result, path
    in_folder = {name.removeprefix("sweeps/four/") for name in names if name.startswith("sweeps/")}
    assert {"sweep.json", "points.csv", "best.yaml", "report.html", "tables/best.csv"} < in_folder
    assert any(name.startswith("figures/") for name in in_folder)
    assert not any(name.endswith((".safetensors", ".arrow", "tokenizer.json", ".png", ".log")) for name in names)
    assert sum(WEIGHTS_REMOVED in name for name in names) == len(list(sweep.output_dir.glob("store/*/*/model.*")))


def test_a_study_says_what_it_was_made_with(study, sweep):
    with zipfile.ZipFile(study) as archive:
        described = json.loads(archive.read(STUDY_FILE))
    assert described["command"] == sweep.read()["command"] and described["points"] == {"all": 4, "done": 4}
    assert described["versions"].keys() >= {"python", "torch", "transformers"}
    assert [model["path"] for model in described["models"]] == ["package://src.data/mini_tldr_base"]
    assert all(model["inputs"]["path"] for model in described["models"])
    assert {data["inputs"]["source"] for data in described["data"]} == {"mini_tldr"}
    assert [judge["inputs"]["name"] for judge in described["judges"]] == ["gold"]
    assert len(described["code"]["packed_with"]["digest"]) == 64


def test_equal_sweeps_are_equal_bytes(study, sweep, copied, tmp_path):
    os.utime(sweep.points_csv)
    write_archive(sweep, tmp_path / "again.zip")
    assert (tmp_path / "again.zip").read_bytes() == study.read_bytes()
    copied.best_yaml.write_text("{}\n")
    write_archive(copied, tmp_path / "other.zip")
    assert (tmp_path / "other.zip").read_bytes() != study.read_bytes()


def test_an_unzipped_study_is_an_output_folder(study, tmp_path):
    with zipfile.ZipFile(study) as archive:
        archive.extractall(tmp_path)
    folder = tmp_path / "sweeps" / "four"
    points = (folder / "points.csv").read_text()
    for command in ("status", "aggregate"):
        done = run_in_process(folder, module=f"sweeps.{command}")
        assert done.returncode == 0, done.stderr
    assert len((folder / "points.csv").read_text().splitlines()) == len(points.splitlines()) == 5
    done = pack(folder)
    assert done.returncode == 0 and (folder / "study.zip").exists(), done.stderr


def test_a_value_of_a_secret_variable_is_refused(sweep, study, tmp_path, monkeypatch):
    with zipfile.ZipFile(study) as archive:
        name = next(name for name in archive.namelist() if name.endswith("samples.jsonl"))
        second = json.loads(archive.read(name).splitlines()[1])["prompt"]
    monkeypatch.setenv("SOME_NAME", second)  # not the name of a secret
    assert pack(sweep.path, "--out", tmp_path / "a.zip").returncode == 0
    monkeypatch.setenv("OTHER_API_KEY", second)
    line = assert_one_line(pack(sweep.path, "--out", tmp_path / "b.zip"))
    assert "samples.jsonl, line 2: has the value of $OTHER_API_KEY" in line and second not in line
    assert [path.name for path in tmp_path.iterdir()] == ["a.zip"]


@pytest.mark.parametrize("form", [lambda v: json.dumps({"a": v}), escape, lambda v: json.dumps(v, ensure_ascii=False)])
def test_a_secret_is_found_as_json_and_html_write_it(form, monkeypatch):
    value = 'pa"ss\\wörd&1'
    monkeypatch.setenv("SOME_TOKEN", value)
    pieces = SecretCheck().pieces
    with pytest.raises(ConfigError, match=r"the value of \$SOME_TOKEN"):
        list(pieces("run_config.json", [f"text\n{form(value)}".encode()]))
    assert list(pieces("run_config.json", [b"wrd&1"])) == [b"wrd&1"]


def test_a_long_secret_is_found_across_two_pieces(monkeypatch):
    monkeypatch.setenv("SOME_TOKEN", "key" * 400)
    with pytest.raises(ConfigError, match=r"the value of \$SOME_TOKEN"):
        list(SecretCheck().pieces("a.bin", [b"x" + b"key" * 300, b"key" * 100]))


def test_tables_of_another_rule_than_the_sweeps_are_refused(copied, tmp_path):
    best = copied.best_yaml.read_text()
    assert pack(copied.path, "--out", tmp_path / "a.zip").returncode == 0
    copied.best_yaml.write_text(best.replace("beta:", "beta: 1", 1))
    line = assert_one_line(pack(copied.path, "--out", tmp_path / "b.zip"))
    assert "selected by sweep.select=best (best.yaml, " in line and "sweeps.aggregate" in line


def test_what_has_the_form_of_a_key_is_refused(copied, tmp_path):
    report, key = copied.report.read_text(), "sk-proj-" + "a1b2c3d4" * 4
    for before in ("", "x" * (2**20 - len(report) - 20)):  # also where the file is read in two pieces
        copied.report.write_text(f"{report}{before}\n{key}\n")
        line = assert_one_line(pack(copied.path, "--out", tmp_path / "study.zip"))
        assert f"report.html, line {report.count(chr(10)) + 2}: has what looks like a key" in line, line
        assert key not in line
    copied.report.write_text(report + "sk-learn, a password, Bearer of news")
    assert pack(copied.path, "--out", tmp_path / "study.zip").returncode == 0


@pytest.mark.parametrize(
    "file", ["evaluate/*/judgements.jsonl", "generate/*/samples.jsonl", "align/*/validation.jsonl"]
)
def test_a_damaged_or_missing_stage_file_is_named(file, copied, tmp_path):
    path = next(copied.store.root.glob(file))
    content = path.read_bytes()
    path.write_bytes(content.replace(b"1", b"2"))
    assert f"{path}: damaged" in assert_one_line(pack(copied.path, "--out", tmp_path / "study.zip"))
    path.unlink()
    assert f"{path}: missing" in assert_one_line(pack(copied.path, "--out", tmp_path / "study.zip"))
    shutil.rmtree(path.parent)
    done = pack(copied.path, "--out", tmp_path / "study.zip")
    # Without a result the tables are not those of the store.
    reason = "not of the results that the store has now" if path.parent.parent.name == "evaluate" else path.parent.name
    assert done.returncode == 2 and reason in done.stderr
    assert not (tmp_path / "study.zip").exists()


def test_what_cannot_be_packed_or_written_is_one_line(copied, tmp_path):
    assert "is no file" in assert_one_line(pack(copied.path, "--out", tmp_path))
    (tmp_path / "file").write_text("mine")
    assert "--out=" in assert_one_line(pack(copied.path, "--out", tmp_path / "file" / "study.zip"))
    folder = make_sweep(tmp_path / "fresh", seeds=1, lrs=1, betas=1, methods=("dpo",))
    assert "python -m sweeps.aggregate" in assert_one_line(pack(folder.path))
    shutil.rmtree(folder.store.root)
    assert "none of its 1 points has a result" in assert_one_line(pack(folder.path))


def test_a_draft_is_not_left(sweep, tmp_path, monkeypatch):
    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("sweeps.study.archive._read", full)
    assert "No space left" in assert_one_line(pack(sweep.path, "--out", tmp_path / "study.zip"), 1)
    assert not list(tmp_path.iterdir())


def test_a_changed_missing_or_added_file_is_told(study, tmp_path):
    with zipfile.ZipFile(study) as archive:
        changed, missing = (next(n for n in archive.namelist() if n.endswith(e)) for e in ("quality.json", ".csv"))
    assert unpack(study, tmp_path / "whole").changes == []
    forged = edited(study, tmp_path / "forged.zip", {changed: lambda text: text + " ", missing: lambda text: None})
    with zipfile.ZipFile(forged, "a") as archive:
        archive.writestr("store/more", "")
    lines = unpack(forged, tmp_path / "forged").changes
    assert lines == [f"{changed} was changed", "store/more was added", f"{missing} is missing"]


@pytest.mark.parametrize("name", ["../evil", "/evil", "a/../../evil", "C:\\evil", "..\\evil", "a\nb"])
def test_no_file_is_unpacked_elsewhere(name, study, tmp_path):
    hostile = Path(shutil.copy(study, tmp_path / "study.zip"))
    with zipfile.ZipFile(hostile, "a") as archive:
        archive.writestr(name, "evil")
    (tmp_path / "into").mkdir()
    with pytest.raises(ValueError, match="outside of the folder"):
        unpack(hostile, tmp_path / "into")
    assert not list(tmp_path.rglob("*evil*"))


def test_what_is_no_study_is_told(study, tmp_path):
    (tmp_path / "text.zip").write_text("text")
    with zipfile.ZipFile(tmp_path / "other.zip", "w") as archive:
        archive.writestr("file", "x")
    cut = tmp_path / "cut.zip"
    cut.write_bytes(study.read_bytes()[:-2000])
    flipped = bytearray(study.read_bytes())
    flipped[len(flipped) // 3] ^= 255
    (tmp_path / "flipped.zip").write_bytes(flipped)
    renamed = edited(study, tmp_path / "n.zip", {STUDY_FILE: lambda text: text.replace('"four"', '"../../x"', 1)})
    newer = edited(study, tmp_path / "s.zip", {STUDY_FILE: lambda text: text.replace('"schema": 1', '"schema": 9')})
    reasons = {
        tmp_path / "text.zip": "no zip file",
        tmp_path / "other.zip": "no study.json in it",
        cut: "damaged",
        tmp_path / "flipped.zip": "damaged",
        renamed: "was changed or is damaged",
        newer: "another version",
        tmp_path / "none.zip": "no such file",
        tmp_path: "is a folder",
    }
    for path, reason in reasons.items():
        with pytest.raises(ValueError, match=reason):
            unpack(path, tmp_path / "into")
