"""Samples through a server that the job starts: the same text as without one, and no server left behind."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.support.commands import SMALL, start, train

PROGRAM = Path(sys.executable).with_name("transformers")
SERVED = [
    "server=transformers",
    f"server.command='{PROGRAM} serve {{checkpoint}} --host 127.0.0.1 --port {{port}} --dtype {{dtype}}'",
]
POINT = ["method=dpo", "beta=0.1", *SMALL, "evaluation.generation.temperature=0"]


def samples(folder):
    """role -> rows of the only sweep point's samples."""
    found = {}
    for path in (folder / "store" / "generate").glob("*/samples.jsonl"):
        stage = json.loads((path.parent / "stage.json").read_text())
        found[stage["fields"]["role"]] = [json.loads(line) for line in path.open()]
    return found


def servers(folder):
    """Processes that serve something below this folder."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listing.splitlines() if f"{PROGRAM} serve {folder}" in line]


@pytest.fixture(scope="module")
def here(tmp_path_factory):
    """The point sampled in its own process, greedily."""
    folder = tmp_path_factory.mktemp("here")
    train(*POINT, f"output_dir={folder}")
    return folder


def test_greedy_samples_of_a_server_are_those_of_the_process_itself(here, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):  # the same checkpoints
        (tmp_path / "store" / kind).symlink_to(here / "store" / kind)
    train(*POINT, *SERVED, f"output_dir={tmp_path}")
    ours, theirs = samples(here), samples(tmp_path)
    assert set(theirs) == {"policy", "baseline"}
    for role, rows in theirs.items():
        for row, other in zip(rows, ours[role], strict=True):
            assert row["response"] == other["response"] and row["finished"] == other["finished"]
            assert row["logp"] == pytest.approx(other["logp"], abs=1e-4)
            assert row["reference_logp"] == pytest.approx(other["reference_logp"], abs=1e-4)
    assert not servers(tmp_path)


def first_responses(process, folder):
    """Files of responses, once the first one is written."""
    deadline, written = time.monotonic() + 120, []
    while not written:
        assert process.poll() is None and time.monotonic() < deadline
        found = (folder / "store" / "generate").glob(".work/*/checkpoints/responses.jsonl")
        written = [path for path in found if path.read_text()]
        time.sleep(0.02)
    return written


def test_a_killed_job_leaves_no_server_and_goes_on_with_the_missing_prompts(here, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):
        (tmp_path / "store" / kind).symlink_to(here / "store" / kind)
    slowly = ["server.concurrency=1"]
    process = start(*POINT, *SERVED, *slowly, f"output_dir={tmp_path}")
    written = first_responses(process, tmp_path)
    assert servers(tmp_path)
    os.kill(process.pid, signal.SIGKILL)
    process.communicate()
    deadline = time.monotonic() + 10
    while servers(tmp_path) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not servers(tmp_path)
    known = sum(len(p.read_text().splitlines()) for p in written)
    done = train(*POINT, *SERVED, f"output_dir={tmp_path}")
    assert known and "result:" in done.stdout
    logs = "".join(path.read_text() for path in (tmp_path / "runs").rglob("*.log"))
    assert f"{known} of 16 prompts were sampled before" in logs
    for role, rows in samples(tmp_path).items():
        assert [row["response"] for row in rows] == [row["response"] for row in samples(here)[role]]


def test_a_server_that_does_not_start_is_one_line_with_its_last_words(here, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):
        (tmp_path / "store" / kind).symlink_to(here / "store" / kind)
    broken = f"server.command='{sys.executable} -m no_such_module {{checkpoint}} {{port}}'"
    done = train(*POINT, "server=vllm", broken, f"output_dir={tmp_path}", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "ended with code 1: " in done.stderr and "no_such_module" in done.stderr


def test_a_server_that_dies_while_it_samples_is_one_line_that_says_so(here, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):
        (tmp_path / "store" / kind).symlink_to(here / "store" / kind)
    many = ["server.concurrency=1", "evaluation.num_prompts=400"]  # it is not through when it is killed
    process = start(*POINT, *SERVED, *many, f"output_dir={tmp_path}")
    first_responses(process, tmp_path)
    running = servers(tmp_path)
    assert running
    for server in running:
        os.kill(int(server), signal.SIGKILL)
    output, _ = process.communicate(timeout=240)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert "the server of server.command ended with code -9 while it sampled: " in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["server=vllm", "server.command='nosuchprogram {checkpoint} {port}'"], "nosuchprogram is not on PATH"),
        (["server=vllm", "server.command='vllm serve --port {port}'"], "needs {checkpoint} and {port}"),
        (["server=vllm", "server.command='vllm serve {checkpoint} {port} {cards}'"], "are all that is filled in"),
        (["server.command=vllm"], "server=none has no such field"),
    ],
)
def test_a_server_that_cannot_be_is_an_error_before_anything_runs(overrides, message, tmp_path):
    done = train(*overrides, f"output_dir={tmp_path}", check=False)
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "store").exists()
