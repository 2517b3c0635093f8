"""Sampling in jobs of their own on a real SLURM cluster (loopback)."""

import pandas as pd

from tests.support.artifacts import results
from tests.support.commands import SMALL, train
from tests.support.on_slurm import (
    LONG,
    SLURM,
    TIMEOUT_S,
    newest_step,
    run_tool,
    sacct_rows,
    submitted,
    sweep,
    wait_finished,
    wait_queue_empty,
)
from tests.support.waiting import wait_until

OWN = "hydra.launcher.sampling=own_job"
# The last learning rate diverges in the first steps.
FOUR = ["method=dpo", "beta=0.1", "lr=0.001,0.002,0.003,1e5", "keep_checkpoints=best", "sweep.name=four"]
POINTS = ["-m", *FOUR, *SMALL]


def test_samples_follow_their_alignment_task_by_task_and_equal_those_of_the_same_job(slurm, tmp_path):
    own, same = (sweep(tmp_path / name, "four") for name in ("own", "same"))
    output = train(*POINTS, *SLURM, OWN, f"output_dir={own.output_dir}").stdout
    assert "4 submitted" in output and "4 points: alignment" in output and "4 points: sampling" in output
    wait_finished(own)
    train(*POINTS, *SLURM, "hydra.launcher.sampling=same_job", f"output_dir={same.output_dir}")
    wait_finished(same)
    assert results(own.output_dir) == results(same.output_dir)
    expected, points = (pd.read_csv(f.points_csv).drop(columns=["seconds", "checkpoint"]) for f in (same, own))
    pd.testing.assert_frame_equal(points, expected)
    assert [point["state"] for point in own.read()["points"]] == ["done"] * 3 + ["failed"]
    assert "diverged" in own.read()["points"][3]["error"]
    assert run_tool("status", own).stdout.count("diverged") == 1

    wait_queue_empty(slurm)
    align, sample = (submitted(own)[kind].jobs for kind in ("align", "sample"))
    rows = sacct_rows(slurm, [*align, *sample])
    for first, then in zip(align[:3], sample[:3], strict=True):
        assert rows[first]["State"] == rows[then]["State"] == "COMPLETED"
        assert rows[then]["Start"] >= rows[first]["End"], "after its own alignment"
    assert rows[sample[0]]["Start"] < rows[align[2]]["End"], "not after those of other points"
    assert rows[align[3]]["State"] == "FAILED" and rows[sample[3]]["State"].startswith("CANCELLED")

    again = train(*POINTS, *SLURM, OWN, f"output_dir={own.output_dir}").stdout
    assert "3 done, 0 in progress, 1 submitted" in again
    assert "jobs cancelled" in run_tool("cancel", own).stdout


def test_sampling_waits_for_an_alignment_that_is_requeued(slurm, local_long_run, tmp_path):
    arguments = ["-m", "method=dpo", "beta=0.1", "lr=0.001,0.002", *LONG, "sweep.name=two", f"output_dir={tmp_path}"]
    train(*arguments, *SLURM, OWN)
    folder = sweep(tmp_path, "two")
    (first, _), (follower, _) = (submitted(folder)[kind].tasks for kind in ("align", "sample"))
    wait_until(lambda: newest_step(tmp_path) > 0 and first.status(), TIMEOUT_S, "a checkpoint")
    slurm.run("scancel", "--signal=USR2", str(first.job))  # as sbatch --signal does before the time limit
    wait_until(lambda: first.status()["starts"] == 2, TIMEOUT_S, "the alignment to start again")
    assert not follower.status() and "2 points: 2 running" in run_tool("status", folder).stdout
    wait_finished(folder)
    assert [point["state"] for point in folder.read()["points"]] == ["done", "done"]
    calm, interrupted = results(local_long_run), results(tmp_path)
    assert calm.items() <= interrupted.items()
    wait_queue_empty(slurm)
    rows = sacct_rows(slurm, [str(first.job), str(follower.job)])
    assert rows[str(follower.job)]["Start"] >= rows[str(first.job)]["End"]
    assert follower.status()["starts"] == 1
