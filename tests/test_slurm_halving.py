"""A search by halving on a real SLURM cluster: a rung a call, nothing twice, and the way past points that fail."""

import pandas as pd

from tests.support.commands import SMALL, train
from tests.support.on_slurm import SLURM, finished, queue, said, sweep_json, tool, until

# The second learning rate diverges.
HALVING = ["-m", "method=orpo", "beta=0.1,1", "lr=1e-3,1e30", "sweep.search=successive_halving", "sweep.rungs=[0.5,1]"]
HALVING += ["sweep.keep_fraction=0.25", *SMALL]


def points(folder):
    return pd.read_csv(folder / "points.csv").drop(columns=["seconds", "checkpoint", "error"])


def test_each_call_goes_on_and_what_failed_is_left_behind_when_it_is_told_so(slurm, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    folder = there / "sweeps" / "h"
    command = [*HALVING, *SLURM, "sweep.name=h", f"output_dir={there}"]
    output = train(*command).stdout
    assert "h: rung 1 of 2: 4 points to 50 % of their steps" in output and "4 submitted now" in output
    assert "the same command goes on with rung 2" in output
    again = train(*command).stdout
    assert "0 submitted now" in again and "rung 2 of 2" not in again, "its jobs are on their way"
    until(lambda: finished(folder))
    assert sweep_json(folder)["search"]["rung"] == 1 and not (folder / "best.yaml").exists()
    status = tool("status", folder).stdout
    assert "4 points: 2 failed, 2 done" in status and "diverged" in status

    output = train(*command, "hydra.launcher.retry_failed=false").stdout
    assert "h: rung 2 of 2: 1 points to the end" in output and "1 submitted now" in output
    until(lambda: finished(folder))
    record = sweep_json(folder)
    assert record["state"] == "failed" and [p["rung"] for p in record["points"]].count(2) == 1
    assert {p["state"] for p in record["points"] if p["lr"] == 1e30} == {"failed"}
    assert sum(task["starts"] for task in said(folder)) == len(said(folder)), "no task ran twice"

    local = train(*HALVING, "sweep.name=h", f"output_dir={here}", check=False)
    assert local.returncode == 1 and "2 of 4 points failed" in local.stderr
    pd.testing.assert_frame_equal(points(folder), points(here / "sweeps" / "h"))
    assert not queue(slurm)
