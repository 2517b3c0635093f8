"""The check of the CUDA path: what it reports, and that a planted bug fails the part that should find it."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from types import SimpleNamespace

import pytest

from benchmarks.gpu_check import report, wheels
from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.results import Limit, PartResult, Row, from_json, to_json
from benchmarks.gpu_check.runner import run_parts
from benchmarks.gpu_check.setting import CPU, REHEARSED, NotHere, Part, Setting
from tests.support.commands import ROOT, environment

PART_FIELDS = {"name": str, "group": str, "where": str, "status": str, "seconds": float, "rows": list, "message": str}
ROW_FIELDS = {"name": str, "value": float, "unit": str, "where": str, "limit": dict, "note": str, "passed": bool}
LIMIT_FIELDS = {"bound": (int, float), "reason": str, "at": str}


def gpu_check(out, *arguments, cwd=ROOT, timeout=900):
    command = [sys.executable, "-m", "benchmarks.gpu_check", *arguments, "--out", str(out)]
    variables = environment() | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, cwd=cwd, env=variables, capture_output=True, text=True, timeout=timeout, check=False)


def with_bug(folder, file, old, new):
    """Copy the project to a folder with one text replaced by another."""
    for name in ("src", "conf", "benchmarks"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("__pycache__"))
    text = (folder / file).read_text()
    assert old in text, f"{file} has no {old}"
    (folder / file).write_text(text.replace(old, new))
    return folder


def check_fields(values, fields, optional=()):
    assert values.keys() == fields.keys()
    for name, kind in fields.items():
        assert isinstance(values[name], kind) or (name in optional and values[name] is None), (name, values[name])


# --- one part, as a command ---------------------------------------------------------------------------------------


def test_a_part_prints_its_line_and_writes_results_of_the_documented_schema(tmp_path):
    done = gpu_check(tmp_path, "--only", "head")
    assert done.returncode == 0, done.stdout + done.stderr
    lines = done.stdout.splitlines()
    assert lines[0].startswith("gpu_check on a machine without a card: torch ")
    assert lines[1] == f"[1/1] head: started [{CPU}]" and lines[2].startswith("[1/1] head: passed in ")
    assert lines[-1].startswith("passed without a card, 1 parts")
    content = json.loads((tmp_path / "results.json").read_text())
    assert content.keys() == {"schema", "command", "device", "passed", "parts"}
    assert content["passed"] is True and content["device"]["card"] is None and content["device"]["torch"]
    (part,) = content["parts"]
    check_fields(part, PART_FIELDS)
    assert part["status"] == "passed" and part["rows"]
    for row in part["rows"]:
        check_fields(row, ROW_FIELDS, optional=("limit",))
        check_fields(row["limit"], LIMIT_FIELDS)
        assert row["where"] == CPU and row["limit"]["reason"]
    assert (tmp_path / "report.png").stat().st_size > 1000
    assert "| head | passed |" in (tmp_path / "report.md").read_text()


def test_a_wrong_scale_of_attention_fails_the_part_that_compares_attention(tmp_path):
    copy = with_bug(tmp_path / "copy", "src/model/attention.py", "scale=scaling,", "scale=1.01 * scaling,")
    done = gpu_check(tmp_path / "out", "--only", "attention", "environment", cwd=copy)
    assert done.returncode == 1 and "FAILED: attention without a card" in done.stdout, done.stdout + done.stderr
    assert "environment: passed" in done.stdout and "Outside their limits:\n  sdpa" in done.stdout


def test_an_unknown_part_is_refused_by_name(tmp_path):
    done = gpu_check(tmp_path, "--only", "heads")
    assert done.returncode == 1 and "--only heads: the parts are environment, attention, head" in done.stderr


# --- the runner ---------------------------------------------------------------------------------------------------


def crash(setting):
    os.kill(os.getpid(), signal.SIGKILL)


def hang(setting):
    time.sleep(600)


def fail(setting):
    raise ValueError("first line\nsecond line")


def absent(setting):
    raise NotHere("no such package")


def miss(setting):
    return [setting.row("error", 2.0, "", Limit(1.0, "because")), setting.row("seconds", 3.0, "s")]


def succeed(setting):
    return [setting.row("error", 0.5, "", Limit(1.0, "because"))]


@pytest.fixture
def make_part(monkeypatch):
    def make(function, timeout=30.0):
        name = f"benchmarks.gpu_check.{function.__name__}"
        monkeypatch.setitem(sys.modules, name, SimpleNamespace(run=function))
        return Part(function.__name__, function.__name__, "correctness", timeout=timeout)

    return make


def test_no_part_ends_the_others_and_each_outcome_is_told_apart(tmp_path, make_part):
    parts = [
        make_part(crash),
        make_part(hang, 0.5),
        make_part(fail),
        make_part(absent),
        make_part(miss),
        make_part(succeed),
    ]
    printed: list[str] = []
    results = run_parts(parts, Setting(None, tmp_path), None, printed.append)
    outcomes = {result.name: (result.status, result.message.partition(" (/")[0]) for result in results}
    assert outcomes == {
        "crash": ("error", "its process ended by SIGKILL"),
        "hang": ("error", "not done after 0.5 s"),
        "fail": ("error", "ValueError: first line"),
        "absent": ("skipped", "no such package"),
        "miss": ("failed", "error is 2, limit <= 1"),
        "succeed": ("passed", ""),
    }
    assert [result.ok for result in results] == [False, False, False, True, False, True]
    assert printed[::2] == [f"[{n}/6] {part.name}: started [{CPU}]" for n, part in enumerate(parts, 1)]
    assert "second line" in (tmp_path / "fail.log").read_text()


def test_parts_for_which_no_time_is_left_are_errors_and_are_not_started(tmp_path, make_part):
    results = run_parts([make_part(hang, 0.5), make_part(succeed)], Setting(None, tmp_path), 0.4, lambda line: None)
    assert [r.status for r in results] == ["error", "error"] and "no time left" in results[1].message
    assert not (tmp_path / "succeed.log").exists()


# --- limits and the report ----------------------------------------------------------------------------------------


def test_a_value_that_is_not_a_number_is_within_no_limit():
    for bound in (Limit(1.0, "most"), Limit(1.0, "least", "least")):
        assert not bound.holds(math.nan) and not bound.holds(math.inf) and bound.holds(1.0)
    assert Limit(1.0, "", "least").holds(2.0) and not Limit(1.0, "", "most").holds(2.0)


def result(name, group, *rows):
    return PartResult.of(name, group, CPU, 1.0, list(rows))


def test_results_are_read_as_they_were_written():
    rows = Row("a", 1.5, "s", REHEARSED), Row("b", math.nan, "", CPU, Limit(1.0, "why"), "note")
    parts = [result("one", "speed", *rows)]
    content = json.loads(json.dumps(to_json(parts, {"card": None}, "command"), allow_nan=False))
    (read,) = from_json(content)
    assert content["passed"] is False and read.status == "failed" and read.rows[0] == rows[0]
    assert math.isnan(read.rows[1].value) and read.rows[1].limit == rows[1].limit
    with pytest.raises(ValueError, match="schema 99"):
        from_json(content | {"schema": 99})


def test_the_other_half_in_the_same_folder_is_kept_unless_the_device_is_another(tmp_path):
    cpu, card = {"card": None}, {"card": "a card"}
    report.write_report([result("old", "correctness"), result("again", "speed")], cpu, "first", tmp_path)
    report.write_report([result("again", "speed", Row("x", 1.0, "s", CPU))], cpu, "second", tmp_path)
    parts = from_json(json.loads((tmp_path / report.RESULTS).read_text()))
    assert [(part.name, len(part.rows)) for part in parts] == [("old", 0), ("again", 1)]
    report.write_report([result("new", "speed")], card, "third", tmp_path)
    assert [part.name for part in from_json(json.loads((tmp_path / report.RESULTS).read_text()))] == ["new"]


# --- wheels -------------------------------------------------------------------------------------------------------


def test_wheels_of_a_folder_can_be_imported_here_and_in_child_processes(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", sys.path[:])
    monkeypatch.setenv("PYTHONPATH", "elsewhere")
    folder = tmp_path / "wheels"
    folder.mkdir()
    with zipfile.ZipFile(folder / "carried-1.0-py3-none-any.whl", "w") as wheel:
        wheel.writestr("carried_package/__init__.py", "VALUE = 7\n")
        info = "carried-1.0.dist-info"
        wheel.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: carried\nVersion: 1.0\n")
        wheel.writestr(f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr(f"{info}/RECORD", "")
    wheels.install(folder, tmp_path / "site")
    command = [sys.executable, "-c", "import carried_package; print(carried_package.VALUE)"]
    assert subprocess.run(command, capture_output=True, text=True, check=True).stdout == "7\n"
    assert sys.path[0] == str(tmp_path / "site") and os.environ["PYTHONPATH"].endswith(":elsewhere")


def test_a_folder_without_wheels_or_with_a_broken_one_is_refused(tmp_path):
    with pytest.raises(SystemExit, match=r"no \.whl file in it"):
        wheels.install(tmp_path, tmp_path / "site")
    (tmp_path / "broken-1.0-py3-none-any.whl").write_text("not a zip")
    with pytest.raises(SystemExit, match=r"--wheels .*broken"):
        wheels.install(tmp_path, tmp_path / "site")


# --- the whole ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_whole_check_passes_without_a_card_and_every_value_says_where_it_comes_from(tmp_path):
    done = gpu_check(tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr
    parts = from_json(json.loads((tmp_path / "results.json").read_text()))
    assert {part.name for part in parts} == {part.name for part in PARTS}
    assert {row.where for part in parts for row in part.rows} == {CPU, REHEARSED}
    assert all(part.rows or part.status == "skipped" for part in parts)
    for part in PARTS:
        assert f"] {part.name}: started [{part.without_card}]" in done.stdout


@pytest.mark.slow
def test_a_cpu_tensor_left_in_the_loss_fails_the_parts_that_rehearse(tmp_path):
    old, new = "else references[indices]\n", "else references[indices].cpu()\n"
    copy = with_bug(tmp_path / "copy", "src/stages/align.py", old, new)
    done = gpu_check(tmp_path / "out", "--only", "memory", "head", cwd=copy)
    assert done.returncode == 1 and "FAILED: memory without a card" in done.stdout, done.stdout + done.stderr
    assert "head: passed" in done.stdout and "src/scores.py" in done.stdout
