"""Jobs of a real SLURM cluster and W&B: each job uploads what it computes, or the aggregation uploads everything."""

import pytest

from tests.support import wandb_server
from tests.support.commands import SMALL
from tests.support.on_slurm import SLURM, TIMEOUT_S, sweep, wait_finished
from tests.support.tracked import metrics_of, run, training_rows
from tests.support.waiting import wait_until


@pytest.mark.parametrize("upload", ["during", "after"])
def test_runs_are_uploaded_once_by_the_jobs_or_by_the_aggregation(slurm, tmp_path, upload):
    folder = sweep(tmp_path, upload)
    options = ["beta=0.2", f"sweep.name={upload}", f"hydra.launcher.upload={upload}", f"output_dir={tmp_path}"]
    with wandb_server.serving() as server:
        done = run(server, "-m", *SMALL, *SLURM, *options)
        assert done.returncode == 0, done.stderr
        wait_finished(folder)
        wait_until(
            lambda: any(r.num_finished for r in server.runs.values() if r.job_type == "aggregate"),
            TIMEOUT_S,
            "the aggregation to be uploaded",
        )
        (point,) = folder.read()["points"]
        align = server.runs[point["identity"]]
        assert training_rows(align.history) == metrics_of(tmp_path, "align", point["stages"]["align"])
        computed = align.config["computed"]["value"]
        assert computed["align"]["slurm_job"].isdigit() and computed["align"]["commit"]
        assert bool(list(folder.jobs.glob("*/tracking-*.log"))) == (upload == "during")
        job_types = sorted(r.job_type for r in server.runs.values())
        assert job_types == ["aggregate", "align", "baseline", "reference", "sft"]
        assert {r.group for r in server.runs.values()} == {upload}
        assert all(r.num_finished == 1 for r in server.runs.values()), "each run was uploaded and finished once"
