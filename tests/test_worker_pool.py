"""The worker pool inside of a job, as SLURM runs it but without SLURM: failures, signals, kills."""

import json
import os
import signal
from dataclasses import replace

import pytest

from launchers.job_order import Schedule
from launchers.slurm.job import EXIT_REQUEUE, NEAR_TIME_LIMIT
from src.planning.plan import make_plan
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from tests.support.artifacts import results
from tests.support.configs import TINY, point
from tests.support.kills import slowed, stopping_at, wait_until_stopped
from tests.support.pool_job import start_job, write_submission

DIVERGES = 1e5  # learning rate
SLOW_PARTS = ["trainer.align.epochs=6"]  # 48 steps: long enough to be hit in the middle


def plan_at(output_dir, *overrides):
    """Return a plan of three points, the second of which diverges."""
    first = point(*TINY, "method=orpo", "beta=1", "keep_checkpoints=best", f"output_dir={output_dir}", *overrides)
    changes = ({"beta": 1.0}, {"beta": 2.0, "lr": DIVERGES}, {"beta": 3.0})
    return make_plan([replace(first, **change) for change in changes], Store(output_dir))


def submitted_at(output_dir):
    return write_submission(SweepFolder(output_dir / "sweeps" / "s"), plan_at(output_dir, *SLOW_PARTS))


def run(submission, **options):
    job = start_job(submission, **options)
    output = job.communicate(timeout=300)[0]
    return job.returncode, output


def states(submission):
    return [task.status()["state"] for task in submission.tasks]


def newest_steps(output_dir):
    """Return the step of the newest checkpoint of each alignment that is not done."""
    steps = {}
    for path in (output_dir / "store").glob("align/.work/*/checkpoints/*/step-*"):
        steps[path.parents[2]] = max(int(path.name[5:]), steps.get(path.parents[2], 0))
    return sorted(steps.values())


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    """Return the job of three points that nothing disturbed: (its submission, exit code, output, output_dir)."""
    output_dir = tmp_path_factory.mktemp("undisturbed")
    submission = submitted_at(output_dir)
    return submission, *run(submission), output_dir


@pytest.mark.slow
def test_a_point_that_fails_ends_alone_and_fails_the_job_at_its_end(undisturbed):
    submission, code, output, output_dir = undisturbed
    assert states(submission) == ["done", "failed", "done"] and code == 1, output
    assert "1 of 3 points of this job failed: orpo beta=2" in output
    error = submission.tasks[1].status()["error"]
    assert error.startswith("diverged at step")
    logs = [task.log.read_text() for task in submission.tasks]
    assert ["diverged" in log for log in logs] == [False, True, False]
    assert all(task.label in log for task, log in zip(submission.tasks, logs, strict=True))
    assert len(list((output_dir / "store").glob("evaluate/*/result.json"))) == 2
    models = list((output_dir / "store").glob("align/*/model.safetensors"))
    assert len(models) == 1, "the worse one of the two was removed while the job ran"


@pytest.mark.slow
@pytest.mark.parametrize("signum", [signal.SIGTERM, signal.SIGKILL])
def test_a_job_that_is_stopped_or_killed_continues_where_it_was(signum, undisturbed, tmp_path):
    submission = submitted_at(tmp_path)
    checkpoint = "align/.work/*/checkpoints/*/step-*"
    # With a second per checkpoint no alignment ends before the worker that stopped hears of the signal.
    job = start_job(submission, env=stopping_at(checkpoint, 5, tmp_path / "stopped") | slowed(checkpoint, 1))
    wait_until_stopped(job)
    os.killpg(job.pid, signum)  # to the workers, too, as slurmstepd does
    os.killpg(job.pid, signal.SIGCONT)
    output = job.communicate(timeout=300)[0]
    steps, ended = newest_steps(tmp_path), list((tmp_path / "store").glob("*/*/DONE"))
    times = {path: path.stat().st_mtime_ns for path in ended}
    assert steps and all(0 < step < 48 for step in steps), "it was hit in the middle"
    if signum == signal.SIGKILL:
        assert job.returncode == -signal.SIGKILL and "running" in states(submission)
    else:
        assert job.returncode == EXIT_REQUEUE and "Traceback" not in output, output
        assert "stopped" in states(submission) and not {"running", "waiting"} & set(states(submission))
        statuses = [task.status() for task in submission.tasks]
        assert not any(status["near_time_limit"] for status in statuses if status["state"] == "stopped")

    run(submission)
    assert states(submission) == ["done", "failed", "done"]
    assert results(tmp_path) == results(undisturbed[3])
    assert all(path.stat().st_mtime_ns == written for path, written in times.items()), "computed again"
    logs = "".join(task.log.read_text() for task in submission.tasks)
    assert "resuming from step" in logs
    failures = submission.tasks[1].log.read_text().count("diverged at step")
    run(submission)  # a third run finds nothing to do, and leaves the point that failed alone
    assert states(submission) == ["done", "failed", "done"]
    assert submission.tasks[1].log.read_text().count("diverged at step") == failures


@pytest.mark.slow
def test_a_worker_that_sees_the_time_limit_coming_stops_all(tmp_path, monkeypatch):
    monkeypatch.setenv("SECONDS_LEFT", "40")  # half of it is for work, whatever a save takes
    plan = plan_at(tmp_path, "trainer.align.epochs=2000")
    submission = write_submission(SweepFolder(tmp_path / "sweeps" / "s"), plan)
    code, output = run(submission)
    assert code == EXIT_REQUEUE, output
    stopped = [task.status() for task in submission.tasks if task.status()["state"] == "stopped"]
    assert stopped and all(status["near_time_limit"] and NEAR_TIME_LIMIT in status["reason"] for status in stopped)


@pytest.mark.slow
def test_each_point_of_a_job_is_computed_by_a_group_of_processes(tmp_path):
    plan = plan_at(tmp_path, "engine=ddp")
    submission = write_submission(SweepFolder(tmp_path / "sweeps" / "s"), plan)
    code, output = run(submission, workers=1, gpus_per_point=2)
    assert states(submission) == ["done", "failed", "done"] and code == 1, output
    records = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("*/*/DONE")]
    assert {r["processes"] for r in records if r["stage"] in ("sft", "align", "generate")} == {2}


def test_a_stage_that_was_stopped_waits_again_without_counting_as_a_retry(tmp_path):
    schedule = Schedule(plan_at(tmp_path))
    for _ in range(3):
        stage = schedule.next()
        assert stage is not None
        schedule.postpone(stage)
    assert not schedule.running and stage.identity in schedule.waiting
    assert schedule.next() is not None
    assert schedule.requeue(stage), "the control: a process that died is retried once"
    schedule.next()
    assert not schedule.requeue(stage)
