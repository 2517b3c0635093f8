"""Jobs of several points on a real SLURM cluster (loopback)."""

import pandas as pd
import yaml

from launchers.slurm.job_records import submissions
from tests.support.artifacts import results
from tests.support.commands import SMALL, train
from tests.support.on_slurm import (
    LONG,
    SLURM,
    TIMEOUT_S,
    is_finished,
    job_of,
    newest_step,
    run_tool,
    sacct_rows,
    submitted,
    sweep,
    task_statuses,
    wait_finished,
    wait_queue_empty,
)
from tests.support.waiting import wait_until

SIXTEEN = [
    *("-m", "method=orpo", "beta=0.1,0.2,0.3,0.4,0.5,0.6,0.8,1,1.5,2,2.5,3,4,5,7,10", *SMALL, "dataset.train_size=64"),
    "keep_checkpoints=best",
]
# Two points at once on two GPUs of a node that no other job may use.
TWO_AT_ONCE = [
    *("hydra.launcher.kinds.align.gpus_per_node=2", "hydra.launcher.kinds.align.additional_parameters.exclusive=true"),
]


def test_sixteen_points_in_two_jobs_have_the_numbers_of_the_local_launcher(slurm, tmp_path):
    """As one job a point has them: tests/test_slurm.py."""
    local, folder = sweep(tmp_path / "local", "s"), sweep(tmp_path / "slurm", "s")
    several = ["hydra.launcher.points_per_job=8", *TWO_AT_ONCE]
    output = train(*SIXTEEN, *SLURM, *several, "sweep.name=s", f"output_dir={folder.output_dir}").stdout
    assert "16 submitted" in output and "16 points in 2 jobs" in output
    most_models = 0

    def has_ended() -> bool:
        nonlocal most_models
        most_models = max(most_models, len(list(folder.store.root.glob("align/*/model.safetensors"))))
        return is_finished(folder)

    wait_until(has_ended, 4 * TIMEOUT_S, "the sweep to finish")
    # One job runs at a time (array_parallelism=2), of two points: the best of all so far, and theirs.
    assert 1 <= most_models <= 3, "models are removed while the jobs run"
    train(*SIXTEEN, "sweep.name=s", f"output_dir={local.output_dir}")

    assert results(folder.output_dir) == results(local.output_dir)
    expected, points = (pd.read_csv(f.points_csv).drop(columns=["seconds", "checkpoint"]) for f in (local, folder))
    pd.testing.assert_frame_equal(points, expected)
    best = [yaml.safe_load(f.best_yaml.read_text())["mini_tldr"]["orpo"] for f in (local, folder)]
    one, other = ({k: v for k, v in entry.items() if k != "checkpoint"} for entry in best)
    assert one == other

    align = submitted(folder)["align"]
    assert len(align.jobs) == 2 and len(align.tasks) == 16
    rows = sacct_rows(slurm, sorted(job for s in submissions(folder) for job in s.jobs))
    assert {row["State"] for row in rows.values()} == {"COMPLETED"}
    assert len(rows) == len({s.kind for s in submissions(folder)}) + 1, "two jobs of points, and the shared stages"
    assert {status["starts"] for status in task_statuses(folder)} == {1}
    assert all(task.own_log.exists() for task in align.tasks)
    assert {point["job"] for point in folder.read()["points"]} == set(align.jobs)


def test_a_point_that_fails_ends_alone_and_a_requeue_recomputes_nothing(slurm, local_long_run, tmp_path):
    # The second learning rate diverges in the first steps.
    arguments = ["-m", "method=dpo", "beta=0.1", "lr=0.001,1e5", *LONG, "sweep.name=two", f"output_dir={tmp_path}"]
    several = [*SLURM, "hydra.launcher.points_per_job=2", *TWO_AT_ONCE]
    train(*arguments, *several)
    folder = sweep(tmp_path, "two")
    job, (good, bad) = job_of(folder, "align"), submitted(folder)["align"].tasks
    wait_until(lambda: bad.status().get("state") == "failed", TIMEOUT_S, "the point to diverge")
    wait_until(lambda: newest_step(tmp_path) > 0, TIMEOUT_S, "a checkpoint of the other one")
    status = run_tool("status", folder)
    assert status.returncode == 1 and "2 points: 1 failed, 1 running" in status.stdout and "diverged" in status.stdout
    finished = {path: path.stat().st_mtime_ns for path in (tmp_path / "store").glob("*/*/DONE")}

    slurm.run("scancel", "--signal=USR2", job)  # as sbatch --signal does before the time limit
    wait_until(lambda: good.status()["starts"] == 2, TIMEOUT_S, "the job to start again")
    assert "2 points: 1 failed" in run_tool("status", folder).stdout
    wait_finished(folder)
    assert [point["state"] for point in folder.read()["points"]] == ["done", "failed"]
    assert results(tmp_path) == results(local_long_run)
    assert all(path.stat().st_mtime_ns == written for path, written in finished.items())
    assert "stopped at" in good.own_log.read_text() and "resuming from step" in good.own_log.read_text()
    assert bad.status()["starts"] == 1 and bad.own_log.read_text().count("StageError: diverged at step") == 1
    wait_queue_empty(slurm)
    assert sacct_rows(slurm, [job])[job]["State"] == "FAILED"

    again = train(*arguments, *several).stdout
    assert "1 done, 0 in progress, 1 submitted" in again
    assert "jobs cancelled" in run_tool("cancel", folder).stdout
