"""Sweeps on a real SLURM cluster (loopback): what is submitted, what is not, and what the user sees."""

import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pandas as pd
import pytest
import yaml

from launchers.slurm.job_records import submissions
from src.store.sweep_folder import SweepFolder
from tests.support.artifacts import results
from tests.support.commands import ROOT, SMALL, environment, run_in_process, start, train
from tests.support.on_slurm import (
    FOUR_POINTS,
    MAX_ARRAY,
    SLURM,
    START_LATER,
    TIMEOUT_S,
    job_of,
    queue,
    run_tool,
    sacct_rows,
    submitted,
    sweep,
    task_statuses,
    wait_finished,
    wait_queue_empty,
)
from tests.support.waiting import wait_until

# Jobs of FOUR_POINTS: sft, reference and baseline, the points, the aggregation.
NUM_JOBS = 3 + 4 + 1


def test_a_sweep_on_slurm_has_the_numbers_of_the_local_launcher(slurm, local_four_points, tmp_path):
    output = train(*FOUR_POINTS, *SLURM, f"output_dir={tmp_path}").stdout
    folder, local = sweep(tmp_path, "four"), sweep(local_four_points, "four")
    assert queue(slurm), "submission does not wait for jobs"
    assert "4 submitted" in output and str(folder.path) in output
    wait_finished(folder)

    assert results(tmp_path) == results(local_four_points)
    expected, points = (pd.read_csv(f.points_csv).drop(columns=["seconds", "checkpoint"]) for f in (local, folder))
    pd.testing.assert_frame_equal(points, expected)

    def best(sweep_folder: SweepFolder) -> dict:
        table = yaml.safe_load(sweep_folder.best_yaml.read_text())["mini_tldr"]
        return {method: {k: v for k, v in entry.items() if k != "checkpoint"} for method, entry in table.items()}

    assert best(folder) == best(local) and folder.report.exists()

    # SFT ran once and before everything else, the aggregation last of all.
    by_kind = submitted(folder)
    assert set(by_kind) == {"sft", "reference", "baseline", "align", "aggregate"}
    rows = sacct_rows(slurm, sorted(job for submission in submissions(folder) for job in submission.jobs))
    assert {row["State"] for row in rows.values()} == {"COMPLETED"}
    sft, aggregation = rows[by_kind["sft"].jobs[0]], rows[by_kind["aggregate"].jobs[0]]
    others = [row for row in rows.values() if row not in (sft, aggregation)]
    assert len(others) == NUM_JOBS - 2
    assert all(sft["End"] <= row["Start"] and row["End"] <= aggregation["Start"] for row in others)
    gpus = [status["cuda_visible_devices"] for status in task_statuses(folder)]
    assert sum(not devices for devices in gpus) == 1, "every job but the aggregation has a GPU"

    record = folder.read()
    assert record["state"] == "done" and all(point["job"] for point in record["points"])
    assert set(record["code"]) == {"commit", "dirty"}
    status = run_tool("status", folder)
    assert status.returncode == 0 and "4 points: 4 done" in status.stdout

    # The same command again finds everything done.
    train(*FOUR_POINTS, *SLURM, f"output_dir={tmp_path}")
    assert not queue(slurm)


def test_the_aggregation_job_pickles_one_path(slurm, tmp_path):
    import submitit

    train(*FOUR_POINTS, *SLURM, START_LATER, f"output_dir={tmp_path}")
    aggregation = submitted(sweep(tmp_path, "four"))["aggregate"]
    (pickle,) = aggregation.folder.glob("*_submitted.pkl")
    call = submitit.core.utils.DelayedSubmission.load(pickle)
    assert call.args == (aggregation.folder,) and call.kwargs == {}


def test_a_failed_sft_is_named_its_dependents_are_cancelled_and_a_rerun_completes(slurm, tmp_path):
    arguments = ["-m", "method=dpo", "beta=0.1,1", *SMALL, "sweep.name=two", *SLURM, f"output_dir={tmp_path}"]
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sft").write_text("a file where a directory should be")
    train(*arguments)
    folder = sweep(tmp_path, "two")

    def status_has_error() -> bool:
        status = run_tool("status", folder)
        return status.returncode == 1 and "Not a directory" in status.stdout

    wait_until(status_has_error, TIMEOUT_S, "the status to show the error of SFT")
    wait_finished(folder)
    wait_queue_empty(slurm)  # dependents do not stay pending
    record = folder.read()
    assert record["state"] == "failed"
    assert {p["state"] for p in record["points"]} == {"cancelled"}
    assert all(
        p["error"].startswith("mini_tldr sft failed: ") and "Not a directory" in p["error"] for p in record["points"]
    )
    rows = sacct_rows(slurm, [job_of(folder, "sft"), job_of(folder, "reference")])
    assert sorted(row["State"].split()[0] for row in rows.values()) == ["CANCELLED", "FAILED"]
    status = run_tool("status", folder)
    assert "cancelled" in status.stdout and f"log: {folder.path}" in status.stdout

    no_retry = train(*arguments, "hydra.launcher.retry_failed=false", check=False)
    assert no_retry.returncode == 1 and "2 of 2 points failed" in no_retry.stderr and not queue(slurm)

    (tmp_path / "store" / "sft").unlink()
    done = train(*arguments, "hydra.launcher.wait=true")
    assert "2 points: 2 done" in done.stdout and "Win rate" in done.stdout
    assert folder.read()["state"] == "done"


def test_only_new_points_are_submitted_and_other_points_are_refused_while_jobs_are_queued(slurm, tmp_path):
    def submit(betas: str, **options: bool) -> subprocess.CompletedProcess[str]:
        arguments = ["-m", "method=dpo", f"beta={betas}", *SMALL, "sweep.name=grown", START_LATER]
        return train(*arguments, *SLURM, f"output_dir={tmp_path}", **options)

    folder = sweep(tmp_path, "grown")
    assert "2 submitted" in submit("0.1,1").stdout
    first_jobs = queue(slurm)
    assert len(first_jobs) == 3 + 2 + 1

    assert "2 in progress, 0 submitted" in submit("0.1,1").stdout and queue(slurm) == first_jobs

    assert "2 in progress, 1 submitted" in submit("0.1,1,3").stdout
    assert len(queue(slurm)) == len(first_jobs) + 1, "one more point, and the aggregation replaced"

    jobs, record = queue(slurm), folder.record.read_bytes()
    fewer = submit("0.1,3", check=False)
    assert fewer.returncode == 2 and len(fewer.stderr.strip().splitlines()) == 1
    assert "sweep.name=grown: 6 jobs of a sweep of this name with other points" in fewer.stderr
    assert f"python -m sweeps.cancel {folder.path}" in fewer.stderr
    assert queue(slurm) == jobs and folder.record.read_bytes() == record

    assert "6 jobs cancelled" in run_tool("cancel", folder).stdout
    wait_until(lambda: len(queue(slurm)) == 1, TIMEOUT_S, "the jobs to leave the queue")
    assert "the old results were moved to grown.1" in submit("0.1,3").stdout
    assert "2 points: 2 queued" in run_tool("status", folder).stdout

    assert "5 jobs cancelled" in run_tool("cancel", folder).stdout
    (aggregation,) = queue(slurm)
    slurm.run("scontrol", "update", f"jobid={aggregation}", "starttime=now")
    wait_finished(folder)
    reasons = [(p["state"], p["error"]) for p in folder.read()["points"]]
    assert reasons == [("cancelled", "mini_tldr sft cancelled: job was cancelled")] * 2


def test_arrays_are_split_at_the_sites_limit_and_share_the_parallelism(slurm, tmp_path):
    betas = ",".join(str(b) for b in range(1, 21))
    arguments = ["-m", "method=dpo", f"beta={betas}", *SMALL, START_LATER, "sweep.name=wide"]
    output = train(*arguments, *SLURM, "hydra.launcher.array_parallelism=5", f"output_dir={tmp_path}").stdout
    assert "20 submitted" in output
    scripts = "".join(path.read_text() for path in sweep(tmp_path, "wide").jobs.glob("*/*_submission.sh"))
    arrays = [(int(last) + 1, int(parallelism)) for last, parallelism in re.findall(r"--array=0-(\d+)%(\d+)", scripts)]
    assert sorted(size for size, _ in arrays) == [4, MAX_ARRAY, MAX_ARRAY]
    assert sum(parallelism for _, parallelism in arrays) == 5


def test_a_submitter_killed_before_recording_its_job_leaves_nothing_that_could_run_twice(slurm, tmp_path):
    # The real sbatch, followed by a pause in which the submitter has not read its answer.
    slow_sbatch = tmp_path / "bin" / "sbatch"
    slow_sbatch.parent.mkdir()
    real = shutil.which("sbatch")
    slow_sbatch.write_text(f'#!/bin/sh\n{real} "$@"\ncase "$*" in *test-only*) ;; *) sleep 60;; esac\n')
    slow_sbatch.chmod(0o755)
    arguments = [*FOUR_POINTS, *SLURM, START_LATER, f"output_dir={tmp_path / 'out'}"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("PATH", f"{slow_sbatch.parent}:{os.environ['PATH']}")
        submitter = start(*arguments)
    wait_until(lambda: queue(slurm), TIMEOUT_S, "the first job")
    os.killpg(submitter.pid, signal.SIGKILL)
    submitter.communicate()
    (orphan,) = queue(slurm)
    train(*arguments)
    assert orphan not in queue(slurm)
    assert len(queue(slurm)) == NUM_JOBS


def test_two_submitters_at_once_submit_every_stage_once(slurm, tmp_path):
    arguments = [*FOUR_POINTS, *SLURM, START_LATER, f"output_dir={tmp_path}"]
    submitters = [start(*arguments), start(*arguments)]
    outputs = [submitter.communicate(timeout=TIMEOUT_S)[0] for submitter in submitters]
    assert [submitter.returncode for submitter in submitters] == [0, 0], outputs
    assert len(queue(slurm)) == NUM_JOBS


def test_a_failed_aggregation_is_reported_and_a_rerun_aggregates(slurm, local_four_points, tmp_path):
    shutil.copytree(local_four_points / "store", tmp_path / "store")
    broken = "hydra.launcher.kinds.aggregate.environment.PYTHONHOME=/nowhere"
    arguments = ["-m", "method=dpo,orpo", "beta=0.1,1,3", *SMALL, "sweep.name=four"]
    train(*arguments, *SLURM, broken, f"output_dir={tmp_path}")
    folder = sweep(tmp_path, "four")
    wait_queue_empty(slurm)
    status = run_tool("status", folder)
    assert status.returncode == 1 and "6 points: 6 done" in status.stdout
    assert "the aggregation failed" in status.stdout
    train(*arguments, *SLURM, f"output_dir={tmp_path}")
    assert run_tool("status", folder).returncode == 0
    assert folder.read()["state"] == "done" and not queue(slurm)


def test_an_outdated_aggregation_is_cancelled_when_the_remaining_points_are_done(slurm, local_four_points, tmp_path):
    shutil.copytree(local_four_points / "store", tmp_path / "store")

    def submit(betas: str) -> str:
        arguments = ["-m", "method=dpo", f"beta={betas}", *SMALL, "sweep.name=less", START_LATER]
        return train(*arguments, *SLURM, f"output_dir={tmp_path}").stdout

    folder = sweep(tmp_path, "less")
    assert "1 done, 0 in progress, 1 submitted" in submit("0.1,3")
    assert len(queue(slurm)) == 2
    assert "1 jobs cancelled" in run_tool("cancel", folder).stdout
    wait_until(lambda: len(queue(slurm)) == 1, TIMEOUT_S, "the point to leave the queue")
    submit("0.1")
    wait_until(lambda: not queue(slurm), TIMEOUT_S, "the aggregation of both points to leave the queue")
    assert folder.read()["state"] == "done"


def copy_of_the_repository(project: Path) -> None:
    """Commit every file that git tracks or could track into a repository of its own."""
    listed = subprocess.run(
        ["git", "ls-files", "-z", "-co", "--exclude-standard"], cwd=ROOT, capture_output=True, text=True, check=True
    )
    for name in filter(None, listed.stdout.split("\0")):
        if (ROOT / name).is_file():
            (project / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, project / name)
    git = ["git", "-C", str(project), "-c", "user.name=t", "-c", "user.email=t@example.org"]
    for command in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "all"]):
        subprocess.run([*git, *command], check=True)


def test_jobs_run_the_code_that_was_submitted(slurm, tmp_path):
    project = tmp_path / "project"
    copy_of_the_repository(project)
    (project / "new.txt").write_text("neither tracked nor ignored")
    arguments = ["-m", "method=dpo", "beta=0.1", *SMALL, *SLURM, "hydra.launcher.additional_parameters.hold=true"]
    command = [sys.executable, "-m", "src.train", *arguments, "sweep.name=frozen", "output_dir=results"]
    subprocess.run(command, cwd=project, env=environment(), check=True, capture_output=True)
    folder = sweep(project / "results", "frozen")
    (code,) = folder.code.iterdir()
    assert (code / "new.txt").exists() and not (code / "results").exists() and not (code / ".git").exists()
    record = folder.read()["code"]
    assert record["dirty"] is True and len(record["commit"]) == 40

    for path in (project / "src").rglob("*.py"):
        path.write_text("raise SystemExit('edited after submission')\n")
    slurm.run("scontrol", "release", ",".join(queue(slurm)))
    wait_finished(folder)
    assert folder.read()["state"] == "done"


def test_ctrl_c_on_a_waiting_command_leaves_the_jobs_running(slurm, tmp_path):
    command = start(*FOUR_POINTS, *SLURM, START_LATER, "hydra.launcher.wait=true", f"output_dir={tmp_path}")
    assert command.stdout is not None
    lines = iter(command.stdout.readline, "")
    assert any("4 queued" in line for line in lines), "the command shows the status of the sweep"
    os.killpg(command.pid, signal.SIGINT)
    output, _ = command.communicate(timeout=300)
    assert command.returncode == 130 and "Jobs keep running" in output and "Traceback" not in output
    assert len(queue(slurm)) == NUM_JOBS


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("hydra.launcher.partition=nowhere", "Invalid partition name specified); requested: --partition=nowhere"),
        ("hydra.launcher.gpus_per_node=2", "engine=single uses one: choose engine=fsdp"),
        ("hydra.launcher.mem_gb=1e6", "Requested node configuration is not available"),
        ("hydra.launcher.kinds.sft.constraint=nothing", "SLURM rejects the sft job"),
        ("hydra.launcher.additional_parameters.no-such=1", "unrecognized option '--no-such=1'"),
        ("hydra.launcher.additional_parameters.array=1", "set by hydra.launcher.array_parallelism"),
        ("hydra.launcher.timeout_min=0", "hydra.launcher.timeout_min=0: must be >= 1"),
        ("hydra.launcher.gpus_per_node=many", "must be a number, or TYPE:NUMBER"),
        ("hydra.launcher.timeout_min=2", "timeout_min=2 is too short"),
        ("hydra.launcher.upload=sometimes", "must be one of during, after"),
        ("hydra.launcher.retry=none", "the key hydra.launcher.retry is called hydra.launcher.retry_failed"),
        ("hydra.launcher.partion=gpu", "there is no key hydra.launcher.partion"),
        ("beta=-1", "beta=-1: must be > 0"),
        ("output_dir=/tmp/with-%j", "/tmp/with-%j: must have no % with hydra/launcher=slurm"),
    ],
)
def test_a_bad_request_is_rejected_before_anything_is_written_or_submitted(slurm, tmp_path, override, message):
    done = run_in_process("-m", "method=dpo,orpo", *SMALL, *SLURM, f"output_dir={tmp_path}", override)
    assert done.returncode == 2 and message in done.stderr and "Traceback" not in done.stderr
    assert len(done.stderr.strip().splitlines()) == 1
    assert not queue(slurm) and not list(tmp_path.iterdir())
