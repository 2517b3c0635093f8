"""Sampling through a server that the job starts: the same text as without one, and no server outlives the job."""

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.commands import SMALL, run_in_process, start, train
from tests.support.endpoint import completion, smollm2_folder
from tests.support.kills import stopping_at, wait_until_stopped
from tests.support.waiting import wait_until

pytestmark = pytest.mark.slow

PROGRAM = Path(sys.executable).with_name("transformers")
SERVED = [
    "server=transformers",
    f"server.command='{PROGRAM} serve {{checkpoint}} --host 127.0.0.1 --port {{port}} --dtype {{dtype}}'",
]
RESPONSES = "generate/.work/*/checkpoints/responses.jsonl"  # renamed into place while it is empty, then appended to
POINT = ["method=dpo", "beta=0.1", *SMALL, "evaluation.generation.temperature=0"]


def samples(folder):
    """Return the rows of samples.jsonl of the only point, by role."""
    rows = {}
    for path in (folder / "store" / "generate").glob("*/samples.jsonl"):
        stage = json.loads((path.parent / "stage.json").read_text())
        rows[stage["inputs"]["role"]] = [json.loads(line) for line in path.open()]
    return rows


def servers(folder):
    """Return the ids of processes that serve a checkpoint below this folder."""
    listing = subprocess.run(["ps", "-ww", "-eo", "pid,args"], capture_output=True, text=True, check=True).stdout
    return [line.split()[0] for line in listing.splitlines() if f"{PROGRAM} serve {folder}" in line]


@pytest.fixture(scope="module")
def in_process(tmp_path_factory):
    """The point sampled greedily without a server."""
    folder = tmp_path_factory.mktemp("in_process")
    train(*POINT, f"output_dir={folder}")
    return folder


def test_greedy_samples_of_a_server_equal_those_without_one(in_process, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):  # the same checkpoints
        (tmp_path / "store" / kind).symlink_to(in_process / "store" / kind)
    train(*POINT, *SERVED, f"output_dir={tmp_path}")
    expected, served = samples(in_process), samples(tmp_path)
    assert set(served) == {"policy", "baseline"}
    for role, rows in served.items():
        for row, other in zip(rows, expected[role], strict=True):
            assert row["response"] == other["response"] and row["finished"] == other["finished"]
            assert row["logp"] == pytest.approx(other["logp"], abs=1e-4)
            assert row["reference_logp"] == pytest.approx(other["reference_logp"], abs=1e-4)
    assert not servers(tmp_path)


def test_a_second_turn_of_a_server_answers_its_own_first_one(in_process, fake_endpoint, tmp_path):
    fake_endpoint.reply = lambda question: completion("[[5]]")
    rows = ({"question_id": n, "category": "ab"[n % 2], "turns": [f"Name {n}.", f"Why {n}?"]} for n in range(4))
    (tmp_path / "question.jsonl").write_text("\n".join(map(json.dumps, rows)))
    questions = [
        *("evaluation=mt_bench", f"evaluation.prompts_file={tmp_path}/question.jsonl", "evaluation.num_prompts=4"),
        *("evaluation.generation.max_new_tokens=8", "+evaluation.generation.temperatures.a=0"),
        *("judge=mt_bench", f"judge.base_url={fake_endpoint.url}"),
    ]
    turns = []
    for name, server in (("none", []), ("served", SERVED)):
        (tmp_path / name / "store").mkdir(parents=True)
        for kind in ("sft", "reference", "align"):
            (tmp_path / name / "store" / kind).symlink_to(in_process / "store" / kind)
        done = run_in_process(*POINT, *questions, *server, f"output_dir={tmp_path / name}")
        assert done.returncode == 0, done.stderr
        turns.append([(row["prompt"], row["response"]) for row in samples(tmp_path / name)["policy"]])
    assert turns[0] == turns[1] and len(turns[0]) == 8
    assert turns[1][1][0] == f"{turns[1][0][0]}\n\n{turns[1][0][1]}\n\nWhy 0?"
    assert not servers(tmp_path)


def test_a_killed_job_leaves_no_server_and_resumes_with_the_missing_prompts(in_process, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):
        (tmp_path / "store" / kind).symlink_to(in_process / "store" / kind)
    third_response = stopping_at(RESPONSES, 4)
    process = start(*POINT, *SERVED, "server.concurrency=1", f"output_dir={tmp_path}", env=third_response)
    wait_until_stopped(process)
    assert servers(tmp_path)
    process.kill()
    process.communicate()
    wait_until(lambda: not servers(tmp_path), 60, "the server to exit")
    done = train(*POINT, *SERVED, f"output_dir={tmp_path}")
    assert "result:" in done.stdout
    logs = "".join(path.read_text() for path in (tmp_path / "runs").rglob("*.log"))
    assert "2 of 16 responses were sampled before" in logs
    for role, rows in samples(tmp_path).items():
        assert [row["response"] for row in rows] == [row["response"] for row in samples(in_process)[role]]


def test_a_server_that_does_not_start_is_one_line_with_its_last_log_line(in_process, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):
        (tmp_path / "store" / kind).symlink_to(in_process / "store" / kind)
    broken = f"server.command='{sys.executable} -m no_such_module {{checkpoint}} {{port}}'"
    done = train(*POINT, "server=vllm", broken, f"output_dir={tmp_path}", check=False)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    assert "server.command exited with code 1: " in done.stderr and "no_such_module" in done.stderr


def test_a_judge_that_the_job_serves_is_started_only_while_it_is_asked(in_process, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):
        (tmp_path / "store" / kind).symlink_to(in_process / "store" / kind)
    judge, starts, program = smollm2_folder(tmp_path / "smollm2"), tmp_path / "starts", tmp_path / "serve.sh"
    program.write_text(f'echo "$1 $3" >> {starts}; exec {PROGRAM} serve "$1" --host 127.0.0.1 --port "$2" --dtype "$3"')
    serve = ["server=transformers", f"server.command='sh {program} {{checkpoint}} {{port}} {{dtype}}'"]
    options = ["judge=tldr", f"judge.model={judge}", "judge.base_url=server", "judge.max_tokens=2"]
    train(*POINT, "evaluation.num_prompts=4", *serve, *options, f"output_dir={tmp_path}")
    started = starts.read_text().splitlines()
    assert len(started) == 3 and started[-1] == f"{judge} bfloat16"  # policy, baseline, judge
    (result,) = (json.loads(path.read_text()) for path in (tmp_path / "store" / "evaluate").glob("*/result.json"))
    assert result["judge"]["answers"] == 8 >= result["judge"]["calls"] > 0 and result["judge"]["prompt_tokens"] > 100
    assert not servers(judge)
    train(*POINT, "evaluation.num_prompts=4", *serve, *options, "evaluation.split_seed=1", f"output_dir={tmp_path}")
    assert starts.read_text().splitlines() == started  # the answers are there: no server is started for nothing
    assert len(list((tmp_path / "store" / "evaluate").glob("*/result.json"))) == 2


def test_a_server_that_dies_while_sampling_is_one_line(in_process, tmp_path):
    (tmp_path / "store").mkdir()
    for kind in ("sft", "reference", "align"):
        (tmp_path / "store" / kind).symlink_to(in_process / "store" / kind)
    third_response = stopping_at(RESPONSES, 4)
    process = start(*POINT, *SERVED, "server.concurrency=1", f"output_dir={tmp_path}", env=third_response)
    wait_until_stopped(process)
    running = servers(tmp_path)
    assert running
    for server in running:
        os.kill(int(server), signal.SIGKILL)
    process.send_signal(signal.SIGCONT)
    output, _ = process.communicate(timeout=300)
    assert process.returncode == 1 and "Traceback" not in output, output
    assert "server.command exited with code -9 while sampling: " in output


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["server=vllm", "server.command='nosuchprogram {checkpoint} {port}'"], "nosuchprogram is not on PATH"),
        (["server=vllm", "server.command='vllm serve --port {port}'"], "needs {checkpoint} and {port}"),
        (
            ["server=vllm", "server.command='vllm serve {checkpoint} {port} {cards}'"],
            "{cards} is no placeholder; only {checkpoint}, {port} and {dtype} are substituted",
        ),
        (
            ["server=vllm", "server.command='x {checkpoint.foo} {port} {checkpoint}'"],
            "{checkpoint.foo} is no placeholder",
        ),
        (["server=vllm", "server.command='x {checkpoint!r} {port} {checkpoint}'"], "{checkpoint!r} is no placeholder"),
        (
            ["server=vllm", "server.command='x {port:>99999999999} {checkpoint}'"],
            "{port:>99999999999} is no placeholder",
        ),
        (["server=vllm", "server.command='x {} {port} {checkpoint}'"], "{} is no placeholder"),
        (["server=vllm", "server.command='x { {port} {checkpoint}'"], "a brace is written {{ or }}"),
        (["server=vllm", "server.command='x \"a {port} {checkpoint}'"], "No closing quotation"),
        (["server=vllm", "server.command=''"], "needs {checkpoint} and {port}"),
        (["server=vllm", "server.command='\"\" {port} {checkpoint}'"], "must begin with a program"),
        (["server.command=vllm"], "server=none has no such field"),
    ],
)
def test_a_wrong_server_is_an_error_before_anything_runs(overrides, message, tmp_path):
    done = run_in_process(*overrides, f"output_dir={tmp_path}")
    assert done.returncode == 2 and message in done.stderr, done.stderr
    assert not (tmp_path / "store").exists()
