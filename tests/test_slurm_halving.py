"""Successive halving on a real SLURM cluster: one rung per call, nothing computed twice, points that fail."""

import pandas as pd

from src.store.sweep_folder import SweepFolder
from tests.support.commands import SMALL, train
from tests.support.on_slurm import SLURM, queue, run_tool, sweep, task_statuses, wait_finished

# The second learning rate diverges.
HALVING = ["-m", "method=orpo", "beta=0.1,1", "lr=1e-3,1e5", "sweep.search=successive_halving", "sweep.rungs=[0.5,1]"]
HALVING += ["sweep.keep_fraction=0.25", *SMALL]


def points(folder: SweepFolder) -> pd.DataFrame:
    return pd.read_csv(folder.points_csv).drop(columns=["seconds", "checkpoint", "error"])


def test_each_call_submits_the_next_rung_and_failed_points_are_skipped_on_request(slurm, tmp_path):
    folder, local = sweep(tmp_path / "slurm", "h"), sweep(tmp_path / "local", "h")
    command = [*HALVING, *SLURM, "sweep.name=h", f"output_dir={folder.output_dir}"]
    output = train(*command).stdout
    assert "h: rung 1 of 2: 4 points" in output and "4 submitted" in output
    assert "rerun the same command to start rung 2" in output
    again = train(*command).stdout
    assert "0 submitted" in again and "rung 2 of 2" not in again, "the jobs of rung 1 are in progress"
    wait_finished(folder)
    assert folder.read()["search"]["rung"] == 1 and not folder.best_yaml.exists()
    status = run_tool("status", folder).stdout
    assert "4 points: 2 failed, 2 done" in status and "diverged" in status

    output = train(*command, "hydra.launcher.retry_failed=false").stdout
    assert "h: rung 2 of 2: 1 points" in output and "1 submitted" in output
    wait_finished(folder)
    record = folder.read()
    assert record["state"] == "failed" and [p["rung"] for p in record["points"]].count(2) == 1
    assert {p["state"] for p in record["points"] if p["lr"] == 1e5} == {"failed"}
    assert all(status["starts"] == 1 for status in task_statuses(folder)), "no task ran twice"

    done = train(*HALVING, "sweep.name=h", f"output_dir={local.output_dir}", check=False)
    assert done.returncode == 1 and "2 of 4 points failed" in done.stderr
    pd.testing.assert_frame_equal(points(folder), points(local))
    assert not queue(slurm)
