"""Sampling in jobs of their own on a real SLURM cluster (loopback)."""

from pathlib import Path

import pandas as pd

from src.store.integrity import WEIGHTS_REMOVED
from tests.support.artifacts import results
from tests.support.commands import SMALL, train
from tests.support.on_slurm import (
    LONG,
    SLURM,
    TIMEOUT_S,
    is_finished,
    newest_step,
    run_tool,
    sacct_rows,
    submitted,
    sweep,
    wait_queue_empty,
)
from tests.support.waiting import wait_until

OWN = "hydra.launcher.sampling=own_job"
ONE_AT_ONCE = "hydra.launcher.array_parallelism=1"
# The last learning rate diverges in the first steps.
POINTS = ["-m", "method=dpo", "beta=0.1", "lr=0.001,0.002,1e5", *SMALL, "keep_checkpoints=best", "sweep.name=three"]


def without_times(folder):
    """Return the results of a sweep; of a model that was removed, not when that was."""
    found = results(folder.output_dir)
    return {path: None if Path(path).name == WEIGHTS_REMOVED else content for path, content in found.items()}


def test_samples_follow_their_alignment_task_by_task_and_equal_those_of_the_same_job(slurm, tmp_path):
    own, same = (sweep(tmp_path / name, "three") for name in ("own_job", "same_job"))
    for folder in (own, same):
        sampling = f"hydra.launcher.sampling={folder.output_dir.name}"
        output = train(*POINTS, *SLURM, ONE_AT_ONCE, sampling, f"output_dir={folder.output_dir}").stdout
        assert "3 submitted" in output and ("3 points: sampling" in output) == (folder is own)
        # One after the other, so that the first sampling job need not wait for a core while the next point is aligned.
        wait_until(lambda folder=folder: is_finished(folder), 3 * TIMEOUT_S, "the sweep to finish")
    assert without_times(own) == without_times(same)
    expected, points = (pd.read_csv(f.points_csv).drop(columns=["seconds", "checkpoint"]) for f in (same, own))
    pd.testing.assert_frame_equal(points, expected)
    assert [point["state"] for point in own.read()["points"]] == ["done", "done", "failed"]
    assert "diverged" in own.read()["points"][2]["error"] and "diverged" in run_tool("status", own).stdout

    wait_queue_empty(slurm)
    align, sample = (submitted(own)[kind].jobs for kind in ("align", "sample"))
    rows = sacct_rows(slurm, [*align, *sample])
    for first, then in zip(align[:2], sample[:2], strict=True):
        assert rows[first]["State"] == rows[then]["State"] == "COMPLETED"
        assert rows[then]["Start"] >= rows[first]["End"], "after its own alignment"
    assert rows[sample[0]]["Start"] < rows[align[1]]["End"], "and not after the next one"
    assert rows[align[2]]["State"] == "FAILED" and rows[sample[2]]["State"].startswith("CANCELLED")

    again = train(*POINTS, *SLURM, OWN, f"output_dir={own.output_dir}").stdout
    assert "2 done, 0 in progress, 1 submitted" in again
    assert "jobs cancelled" in run_tool("cancel", own).stdout


def test_sampling_waits_for_an_alignment_that_is_requeued(slurm, tmp_path):
    longer = [*LONG, "trainer.align.epochs=8"]
    train(
        "-m",
        "method=dpo",
        "beta=0.1",
        "lr=0.001,0.002",
        *longer,
        "sweep.name=two",
        f"output_dir={tmp_path}",
        *SLURM,
        OWN,
    )
    folder = sweep(tmp_path, "two")
    (first, _), (follower, _) = (submitted(folder)[kind].tasks for kind in ("align", "sample"))
    wait_until(lambda: newest_step(tmp_path) > 0 and first.status(), 2 * TIMEOUT_S, "a checkpoint of the first one")
    slurm.run("scancel", "--signal=USR2", str(first.job))  # as sbatch --signal does before the time limit
    wait_until(lambda: first.status()["starts"] == 2, 2 * TIMEOUT_S, "the alignment to start again")
    assert not follower.status() and "running" in run_tool("status", folder).stdout
    wait_until(lambda: is_finished(folder), 3 * TIMEOUT_S, "the sweep to finish")
    assert [point["state"] for point in folder.read()["points"]] == ["done", "done"]
    assert follower.status()["starts"] == 1
    wait_queue_empty(slurm)
    rows = sacct_rows(slurm, [str(first.job), str(follower.job)])
    assert rows[str(follower.job)]["Start"] >= rows[str(first.job)]["End"]
