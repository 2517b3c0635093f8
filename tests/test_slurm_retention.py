"""keep_checkpoints=best on a real SLURM cluster (loopback), each point a job: jobs remove models while the sweep runs.

Jobs of several points: tests/test_slurm_points_per_job.py.
"""

import shutil
from pathlib import Path

import yaml

from tests.support.commands import SMALL, train
from tests.support.on_slurm import SLURM, TIMEOUT_S, is_finished, sweep
from tests.support.waiting import wait_until

FOUR_MORE = ["-m", "method=orpo", "beta=0.2,0.5,2,3", *SMALL, "sweep.name=kept", "keep_checkpoints=best"]


def test_a_model_is_on_disk_for_each_method_and_running_job_and_at_the_end_the_best(slurm, local_four_points, tmp_path):
    for kind in ("sft", "generate"):  # what the points share
        shutil.copytree(local_four_points / "store" / kind, tmp_path / "store" / kind)
    assert "4 submitted" in train(*FOUR_MORE, *SLURM, f"output_dir={tmp_path}").stdout
    folder, numbers = sweep(tmp_path, "kept"), []

    def models():
        return {path.parent.name for path in (tmp_path / "store").glob("align/*/model.safetensors")}

    def finished():
        numbers.append(len(models()))
        return is_finished(folder)

    wait_until(finished, 2 * TIMEOUT_S, "the sweep to finish")
    assert 1 < max(numbers) <= 1 + 2, "one method, two jobs at once"
    best = yaml.safe_load(folder.best_yaml.read_text())["mini_tldr"]["orpo"]
    assert models() == {Path(best["checkpoint"]).name}
