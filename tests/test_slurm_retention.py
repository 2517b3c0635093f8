"""keep_checkpoints=best on a real SLURM cluster (loopback), each point a job: jobs remove models while the sweep runs.

Jobs of several points: tests/test_slurm_points_per_job.py.
"""

from pathlib import Path

import yaml

from tests.support.commands import SMALL, train
from tests.support.on_slurm import SLURM, TIMEOUT_S, is_finished, sweep
from tests.support.waiting import wait_until

SIX_POINTS = ["-m", "method=orpo,simpo", "beta=0.1,0.5,2", *SMALL, "sweep.name=kept", "keep_checkpoints=best"]


def test_a_model_is_on_disk_for_each_method_and_running_job_and_at_the_end_the_best(slurm, tmp_path):
    train(*SIX_POINTS, *SLURM, f"output_dir={tmp_path}")
    folder, numbers = sweep(tmp_path, "kept"), []

    def models():
        return {path.parent.name for path in (tmp_path / "store").glob("align/*/model.safetensors")}

    def finished():
        numbers.append(len(models()))
        return is_finished(folder)

    wait_until(finished, 2 * TIMEOUT_S, "the sweep to finish")
    assert 2 < max(numbers) <= 2 + 2 < len(folder.read()["points"]), "two methods, two jobs at once"
    best = yaml.safe_load(folder.best_yaml.read_text())["mini_tldr"]
    assert models() == {Path(entry["checkpoint"]).name for entry in best.values()} and len(best) == 2
