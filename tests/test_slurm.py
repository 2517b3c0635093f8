"""Sweeps on a real SLURM cluster (loopback): what is submitted, what is not, and what a user is told."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pandas as pd
import pytest
import yaml

from tests.support.artifacts import results
from tests.support.commands import ROOT, SMALL, environment, start, train
from tests.support.on_slurm import (
    FOUR,
    LATER,
    MAX_ARRAY,
    SLURM,
    accounted,
    finished,
    queue,
    said,
    submissions,
    sweep_json,
    tool,
    until,
)


def test_the_same_sweep_gives_the_same_numbers_on_slurm_as_here(slurm, calm, tmp_path):
    begun = time.monotonic()
    output = train(*FOUR, *SLURM, f"output_dir={tmp_path}").stdout
    assert time.monotonic() - begun < 10, "submission must not wait for jobs"
    folder = tmp_path / "sweeps" / "four"
    assert "4 submitted now" in output and str(folder) in output
    until(lambda: finished(folder))

    assert results(tmp_path) == results(calm)
    here, there = (pd.read_csv(f / "sweeps" / "four" / "points.csv") for f in (calm, tmp_path))
    own = ["seconds", "checkpoint"]
    pd.testing.assert_frame_equal(here.drop(columns=own), there.drop(columns=own))

    def best(f: Path) -> dict:
        table = yaml.safe_load((f / "sweeps" / "four" / "best.yaml").read_text())["mini_tldr"]
        return {method: {k: v for k, v in entry.items() if k != "checkpoint"} for method, entry in table.items()}

    assert best(calm) == best(tmp_path)
    assert (folder / "report.html").exists()

    # SFT ran once, and everything else began after it, the aggregation last of all.
    made = submissions(folder)
    assert set(made) == {"sft", "reference", "baseline", "point", "aggregate"}
    jobs = {
        task["job"] for path in folder.glob("jobs/*/submission.json") for task in json.loads(path.read_text())["tasks"]
    }
    rows = accounted(slurm, sorted(jobs))
    assert {row["State"] for row in rows.values()} == {"COMPLETED"}
    sft = rows[made["sft"]["tasks"][0]["job"]]
    last = rows[made["aggregate"]["tasks"][0]["job"]]
    others = [row for job, row in rows.items() if row not in (sft, last)]
    assert len(others) == 6
    assert all(sft["End"] <= row["Start"] and row["End"] <= last["Start"] for row in others)
    gpus = [task["cuda_visible_devices"] for task in said(folder)]
    assert sorted(filter(None, gpus)) and gpus.count(None) + gpus.count("") == 1, "all but the aggregation had a GPU"

    record = sweep_json(folder)
    assert record["state"] == "done" and all(point["job"] for point in record["points"])
    assert set(record["code"]) == {"commit", "dirty"}
    status = tool("status", folder)
    assert status.returncode == 0 and "4 points: 4 done" in status.stdout

    # Once more: nothing to do, and nothing submitted.
    begun = time.monotonic()
    train(*FOUR, *SLURM, f"output_dir={tmp_path}")
    assert time.monotonic() - begun < 10 and not queue(slurm)


def test_a_failing_sft_is_named_children_are_cancelled_and_the_same_command_completes(slurm, tmp_path):
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sft").write_text("in the way")
    train(*FOUR, *SLURM, f"output_dir={tmp_path}")
    folder = tmp_path / "sweeps" / "four"

    def told() -> bool:
        status = tool("status", folder)
        return status.returncode == 1 and "NotADirectoryError" in status.stdout

    until(told, 30)
    until(lambda: finished(folder))
    until(lambda: not queue(slurm), 10)  # children do not stay pending
    record = sweep_json(folder)
    assert record["state"] == "failed"
    assert {p["state"] for p in record["points"]} == {"cancelled"}
    assert all(p["error"].startswith("mini_tldr sft failed: NotADirectoryError") for p in record["points"])
    made = submissions(folder)
    rows = accounted(slurm, [made["sft"]["tasks"][0]["job"], made["reference"]["tasks"][0]["job"]])
    assert sorted(row["State"].split()[0] for row in rows.values()) == ["CANCELLED", "FAILED"]
    status = tool("status", folder)
    assert "cancelled" in status.stdout and f"log: {folder}" in status.stdout

    none = train(*FOUR, *SLURM, "hydra.launcher.retry_failed=false", f"output_dir={tmp_path}", check=False)
    assert none.returncode == 1 and "4 of 4 points failed" in none.stderr and not queue(slurm)

    (tmp_path / "store" / "sft").unlink()
    done = train(*FOUR, *SLURM, "hydra.launcher.wait=true", f"output_dir={tmp_path}")
    assert "4 points: 4 done" in done.stdout and "Win rate" in done.stdout
    assert sweep_json(folder)["state"] == "done"


def test_only_what_is_new_is_submitted_and_what_is_gone_is_offered(slurm, tmp_path):
    def submit(betas: str) -> str:
        arguments = ["-m", "method=dpo", f"beta={betas}", *SMALL, "sweep.name=grown", LATER]
        return train(*arguments, *SLURM, f"output_dir={tmp_path}").stdout

    folder = tmp_path / "sweeps" / "grown"
    assert "2 submitted now" in submit("0.1,1")
    before = queue(slurm)
    assert len(before) == 3 + 2 + 1

    again = submit("0.1,1")
    assert "2 on their way, 0 submitted now" in again and queue(slurm) == before

    more = submit("0.1,1,3")
    assert "2 on their way, 1 submitted now" in more
    # One point more, and the aggregation in place of the former one.
    assert len(queue(slurm)) == len(before) + 1

    fewer = submit("0.1,3")
    assert "dpo beta=1 lr=0.001" in fewer and f"sweeps.cancel {folder} --removed" in fewer
    assert len(queue(slurm)) == len(before) + 1, "nothing is cancelled no_progress"
    status = tool("status", folder)
    assert "2 points: 2 queued" in status.stdout and "no longer has" in status.stdout

    assert "1 jobs cancelled" in tool("cancel", folder, "--removed").stdout
    until(lambda: len(queue(slurm)) == len(before))
    assert "2 points: 2 queued" in tool("status", folder).stdout

    assert "5 jobs cancelled" in tool("cancel", folder).stdout
    # The aggregation is what remains, and writes down what became of them.
    (left,) = queue(slurm)
    slurm.run("scontrol", "update", f"jobid={left}", "starttime=now")
    until(lambda: finished(folder))
    reasons = [(p["state"], p["error"]) for p in sweep_json(folder)["points"]]
    assert reasons == [("cancelled", "mini_tldr sft cancelled: its job was cancelled")] * 2


def test_arrays_are_split_at_the_sites_limit_and_run_as_many_at_once_as_asked(slurm, tmp_path):
    betas = ",".join(str(b) for b in range(1, 21))
    arguments = ["-m", "method=dpo", f"beta={betas}", *SMALL, LATER, "sweep.name=wide"]
    output = train(*arguments, *SLURM, "hydra.launcher.array_parallelism=5", f"output_dir={tmp_path}").stdout
    assert "20 submitted now" in output
    arrays = [
        s for p in (tmp_path / "sweeps" / "wide").glob("jobs/*/*_submission.sh") for s in p.read_text().split("\n")
    ]
    arrays = sorted(line for line in arrays if "--array=" in line)
    sizes = [int(line.partition("-")[2].partition("=0-")[2].partition("%")[0]) + 1 for line in arrays]
    assert sorted(sizes) == [4, 8, 8] and max(sizes) <= MAX_ARRAY
    assert sum(int(line.partition("%")[2].strip("'")) for line in arrays) == 5


def test_a_driver_killed_between_sbatch_and_its_note_leaves_nothing_that_could_run_twice(slurm, tmp_path):
    # The real sbatch, and then a pause in which its answer has not reached the driver.
    slow = tmp_path / "bin" / "sbatch"
    slow.parent.mkdir()
    slow.write_text(f'#!/bin/sh\n{shutil.which("sbatch")} "$@"\ncase "$*" in *test-only*) ;; *) sleep 60;; esac\n')
    slow.chmod(0o755)
    arguments = [*FOUR, *SLURM, LATER, f"output_dir={tmp_path / 'out'}"]
    path = os.environ["PATH"]
    os.environ["PATH"] = f"{slow.parent}:{path}"
    try:
        driver = start(*arguments)
    finally:
        os.environ["PATH"] = path
    until(lambda: queue(slurm))
    os.killpg(driver.pid, signal.SIGKILL)
    driver.communicate()
    (orphan,) = queue(slurm)
    train(*arguments)
    assert orphan not in queue(slurm)
    assert len(queue(slurm)) == 3 + 4 + 1


def test_two_drivers_at_once_submit_every_stage_once(slurm, tmp_path):
    arguments = [*FOUR, *SLURM, LATER, f"output_dir={tmp_path}"]
    drivers = [start(*arguments), start(*arguments)]
    outputs = [driver.communicate(timeout=60)[0] for driver in drivers]
    assert [driver.returncode for driver in drivers] == [0, 0], outputs
    assert len(queue(slurm)) == 3 + 4 + 1


def test_an_aggregation_that_fails_is_not_mistaken_for_a_sweep_that_is_done(slurm, calm, tmp_path):
    shutil.copytree(calm / "store", tmp_path / "store")
    broken = "hydra.launcher.kinds.aggregate.environment.PYTHONHOME=/nowhere"
    arguments = ["-m", "method=dpo,orpo", "beta=0.1,1,3", *SMALL, "sweep.name=four"]
    train(*arguments, *SLURM, broken, f"output_dir={tmp_path}")
    until(lambda: not queue(slurm))
    status = tool("status", tmp_path / "sweeps" / "four")
    assert status.returncode == 1 and "6 points: 6 done" in status.stdout
    assert "the aggregation failed" in status.stdout
    train(*arguments, *SLURM, f"output_dir={tmp_path}")
    assert tool("status", tmp_path / "sweeps" / "four").returncode == 0
    assert sweep_json(tmp_path / "sweeps" / "four")["state"] == "done" and not queue(slurm)


def test_a_sweep_made_smaller_until_all_is_done_is_not_overwritten_later(slurm, calm, tmp_path):
    shutil.copytree(calm / "store", tmp_path / "store")

    def submit(betas: str) -> str:
        arguments = ["-m", "method=dpo", f"beta={betas}", *SMALL, "sweep.name=less", LATER]
        return train(*arguments, *SLURM, f"output_dir={tmp_path}").stdout

    assert "1 done, 0 on their way, 1 submitted now" in submit("0.1,3")
    point = submissions(tmp_path / "sweeps" / "less")["point"]["tasks"][0]["job"]
    assert len(queue(slurm)) == 2
    assert "dpo beta=3 lr=0.001" in submit("0.1")
    until(lambda: queue(slurm) == [point], 10)
    assert sweep_json(tmp_path / "sweeps" / "less")["state"] == "done"


def test_what_was_submitted_is_what_runs(slurm, tmp_path):
    project = tmp_path / "project"
    tracked = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True
    )
    for name in filter(None, tracked.stdout.split("\0")):
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    git = ["git", "-C", str(project), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)
    (project / "new.txt").write_text("neither tracked nor ignored")
    arguments = ["-m", "method=dpo", "beta=0.1", *SMALL, *SLURM, "hydra.launcher.additional_parameters.hold=true"]
    command = [sys.executable, "-m", "src.train", *arguments, "sweep.name=frozen", "output_dir=results"]
    subprocess.run(command, cwd=project, env=environment(), check=True, capture_output=True)
    folder = project / "results" / "sweeps" / "frozen"
    (code,) = (folder / "code").iterdir()
    assert (code / "new.txt").exists() and not (code / "results").exists() and not (code / ".git").exists()
    record = sweep_json(folder)["code"]
    assert record["dirty"] is True and len(record["commit"]) == 40

    for path in (project / "src").rglob("*.py"):
        path.write_text("raise SystemExit('edited after submission')\n")
    slurm.run("scontrol", "release", ",".join(queue(slurm)))
    until(lambda: finished(folder))
    assert sweep_json(folder)["state"] == "done"


def test_leaving_a_waiting_command_leaves_the_jobs(slurm, tmp_path):
    driver = start(*FOUR, *SLURM, LATER, "hydra.launcher.wait=true", f"output_dir={tmp_path}")
    until(lambda: len(queue(slurm)) == 3 + 4 + 1)
    time.sleep(2)
    os.killpg(driver.pid, signal.SIGINT)
    output, _ = driver.communicate(timeout=30)
    assert driver.returncode == 130 and "jobs go on" in output and "Traceback" not in output
    assert len(queue(slurm)) == 3 + 4 + 1


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.launcher.partition=nowhere", "Invalid partition name specified); asked for: --partition=nowhere"),
        ("hydra.launcher.mem_gb=1e6", "Requested node configuration is not available"),
        ("hydra.launcher.kinds.sft.constraint=nothing", "SLURM refuses the sft job"),
        ("hydra.launcher.additional_parameters.no-such=1", "unrecognized option '--no-such=1'"),
        ("hydra.launcher.additional_parameters.array=1", "decided by hydra.launcher.array_parallelism"),
        ("hydra.launcher.timeout_min=0", "hydra.launcher.timeout_min=0: must be >= 1"),
        ("hydra.launcher.gpus_per_node=many", "must be a number, or TYPE:NUMBER"),
        ("hydra.launcher.timeout_min=2", "would be told to stop as they start"),
        ("hydra.launcher.retry=sometimes", "must be one of failed, none"),
        ("hydra.launcher.partion=gpu", "Key 'partion' not in 'SlurmOptions'"),
        ("beta=-1", "beta=-1: must be > 0"),
    ],
)
def test_a_bad_request_is_refused_before_anything_is_written_or_submitted(slurm, tmp_path, override, message):
    done = train("-m", "method=dpo,orpo", *SMALL, *SLURM, f"output_dir={tmp_path}", override, check=False)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not queue(slurm) and not list(tmp_path.iterdir())
