"""The suite of random cases: what it counts as broken, and that it repeats itself. `make fuzz` runs more of it."""

import subprocess
import sys

import pytest

from src.data.examples import Example
from src.data.tokenization import RowCounts, TokenizedDataset
from tests.fuzz import damage, invariants
from tests.fuzz.__main__ import KINDS, draw
from tests.fuzz.invariants import check_artifacts, check_command, check_secrets, check_written, files_below
from tests.fuzz.sandbox import CANARIES, Finished
from tests.support.artifacts import results
from tests.support.commands import ROOT, run_in_process


def ended(code=2, stderr="error: beta=x: must be a number\n", stdout="", seconds=1.0):
    return Finished("python -m src.train", code, stdout, stderr, seconds)


@pytest.mark.parametrize(
    "done",
    [
        ended(),
        ended(0, ""),
        ended(0, "warning: 2 of 9 rows dropped\n2026-01-01 10:00:00 WARNING slow disk\n"),
        ended(1, "failed: mini_tldr sft: disk full\n"),
        ended(130, "\nInterrupted. Run the same command again to resume.\n"),
        ended(2, "usage: train.py [--help]\ntrain.py: error: unrecognized arguments: --nope\n"),
    ],
)
def test_what_a_command_may_do(done):
    assert check_command(done) == []


@pytest.mark.parametrize(
    ("done", "why"),
    [
        (ended(3), "exit code 3"),
        (ended(-9), "exit code -9"),
        (ended(None, ""), "no end within"),
        (ended(0), "exit code 0 with"),
        (ended(1, ""), "without a line that says why"),
        (ended(2, "beta is wrong\n"), "without a line that says why"),
        (ended(2, "error: a\nerror: b\n"), "2 lines say what failed"),
        (ended(2, "error: a value of\nmany lines\n"), "other lines"),
        (ended(1, "Traceback (most recent call last):\nKeyError: 'x'\nfailed: x\n"), "traceback"),
        (ended(1, "failed: KeyError: 'x'\n"), "no word for users"),
        (ended(2, "error: beta=\x1b[31m: must be a number\n"), "control character"),
        (ended(2, f"error: beta={'9' * 5000}: must be a number\n"), "a message of"),
    ],
)
def test_what_a_command_may_not_do(done, why):
    assert any(why in broken for broken in check_command(done))


BAD_COMMANDS = """
import pathlib, sys
from tests.fuzz.invariants import check_command
from tests.fuzz.sandbox import Sandbox
folder = pathlib.Path(sys.argv[1])
(folder / "bad_command.py").write_text("import sys, time\\ntime.sleep(60) if sys.argv[1:] == ['slow'] else {}['x']\\n")
sys.path.insert(0, str(folder))
sandbox = Sandbox(folder / "case")
print(check_command(sandbox.run(module="bad_command")))
print(check_command(sandbox.run("slow", module="bad_command", timeout=5)))
"""


def test_a_command_that_ends_in_a_traceback_or_runs_too_long_is_caught(tmp_path):
    script = [sys.executable, "-c", BAD_COMMANDS, str(tmp_path)]
    raised, slow = subprocess.run(script, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    assert "traceback: KeyError: 'x'" in raised and slow == "['no end within 5 s']"


def test_files_outside_output_dir_and_secrets_anywhere_are_caught(tmp_path):
    out, before = tmp_path / "work" / "out", files_below(tmp_path)
    (out / "runs").mkdir(parents=True)
    (out / "runs" / "log").write_text("harmless")
    assert check_written(before, tmp_path, [out]) == [] and check_secrets(ended(), tmp_path) == []
    (out / "runs" / "log").write_text(f"key {CANARIES['HF_TOKEN']}")
    (tmp_path / "work" / "pwned").touch()
    assert check_written(before, tmp_path, [out]) == ["written outside output_dir: work/pwned and 0 more"]
    assert check_secrets(ended(), tmp_path) == ["a secret in work/out/runs/log"]
    assert (
        check_secrets(ended(stderr=f"error: {invariants.TYPED_CANARY}"), tmp_path / "work")[0] == "a secret in stderr"
    )


def test_an_artifact_of_other_content_is_caught(tmp_path):
    folder = tmp_path / "store" / "align" / "0a1b"
    folder.mkdir(parents=True)
    for name, text in {"DONE": '{"stage": "align", "seconds": 1}', "model.safetensors": "weights"}.items():
        (folder / name).write_text(text)
    undisturbed = results(tmp_path)
    (folder / "DONE").write_text('{"stage": "align", "seconds": 2}')
    assert check_artifacts(tmp_path, undisturbed) == []
    (folder / "model.safetensors").write_text("Weights")
    differs = ["align/0a1b/model.safetensors differs from an undisturbed run"]
    assert check_artifacts(tmp_path, undisturbed) == differs
    assert check_artifacts(tmp_path, undisturbed, unread={"align/0a1b/model.safetensors"}) == []
    (folder / "DONE").unlink()
    assert check_artifacts(tmp_path, undisturbed) == []  # absent


@pytest.mark.parametrize("kind", KINDS)
def test_a_seed_and_a_number_are_always_the_same_case(kind):
    drawn = [draw(kind, 0, number).content for number in range(12)]
    assert drawn == [draw(kind, 0, number).content for number in range(12)]
    assert drawn[3:6] != [draw(kind, 1, number).content for number in range(3, 6)]
    assert len(set(map(repr, drawn))) == 12


@pytest.mark.parametrize("action", [a for a in damage.ACTIONS if not a.startswith("stray") and a != "swap"])
def test_every_kind_of_damage_changes_a_file(tmp_path, action):
    path = tmp_path / "store" / "evaluate" / "0a1b" / "result.json"
    path.parent.mkdir(parents=True)
    path.write_text('{"schema": 2,\n "n": 4}\n')
    before = damage.state(path)
    changed = damage.apply(damage.Change(action, 0, 0, 400, 0), tmp_path)
    assert path in changed and damage.state(path) != before


@pytest.mark.parametrize("multirun", [[], ["-m"]])
@pytest.mark.parametrize(
    "override",
    [
        *("dataset.sft.path=x", "++dataset.preference.tokens=${seed}", "dataset.sft={a:b}", "tracking=[inf,0.5]"),
        *(
            "dataset.sft.tokens=0.1",
            "~init.sft_weight='" + "x" * 6000 + "'",
            "hydra/sweeper=8",
            "~init=[1e-5,1]",
            "dataset=[2]",
            "trainer.sft.lr=${hydra:runtime.nope}",
        ),
    ],
)
def test_what_hydra_has_no_words_for_is_one_line(multirun, override):
    done = run_in_process(*multirun, "dry_run=true", override)
    assert done.returncode == 2 and done.stderr.count("\n") == 1, done.stderr
    assert override.partition("=")[0].lstrip("+~") in done.stderr
    assert not check_command(ended(done.returncode, done.stderr))


def test_a_swept_key_below_a_table_that_is_null_is_one_line():
    done = run_in_process("-m", "dry_run=true", "dataset.sft.tokens=0.1,0.5")
    assert done.returncode == 2 and done.stderr.startswith("error: dataset.sft.tokens=0.1"), done.stderr


@pytest.mark.slow
def test_random_cases_break_nothing():
    command = [sys.executable, "-m", "tests.fuzz", "--seed", "0", "--cases", "24", "--jobs", "1"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.parametrize(
    "change", [lambda data: data[:-900] + bytes([data[-900] ^ 1]) + data[-899:], lambda data: data + b"x"]
)
def test_a_cache_of_tokens_is_read_only_as_it_was_saved(tmp_path, change):
    def save():
        examples = [Example((1, 2, n), ((3, 2), (4, 2))) for n in range(5, 25)]
        TokenizedDataset.collect(examples, RowCounts()).save(tmp_path / "tokens")

    save()
    assert len(TokenizedDataset.load(tmp_path / "tokens").examples) == 20
    (arrow,) = (tmp_path / "tokens").glob("*.arrow")
    arrow.write_bytes(change(arrow.read_bytes()))
    assert TokenizedDataset.load(tmp_path / "tokens") is None
    save()
    assert TokenizedDataset.load(tmp_path / "tokens") is not None
