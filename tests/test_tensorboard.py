"""TensorBoard's event files have what the store has, each step once, whatever happens to other trackers."""

import json
import os
import signal
import subprocess
import sys

import pytest

from src.store.files import read_json
from src.store.sweep_folder import SweepFolder
from tests.support import wandb_server
from tests.support.commands import ROOT, SMALL, command
from tests.support.tracked import metrics_of, run, scalars, shell
from tests.support.waiting import wait_until


def run_folder(out, group, identity):
    (folder,) = (out / "tensorboard" / group).glob(f"*-{identity[-8:]}")
    return folder


@pytest.mark.slow
def test_curves_and_results_of_a_sweep_are_those_of_the_store(tmp_path):
    arguments = ["-m", *SMALL, "beta=0.2,0.4", f"output_dir={tmp_path}", "sweep.name=tb", "tracking=tensorboard"]
    done = run(None, *arguments)
    assert done.returncode == 0 and "warning" not in done.stderr, done.stderr
    assert f"tensorboard --logdir {tmp_path}/tensorboard" in done.stdout and "W&B" not in done.stdout
    for point in SweepFolder(tmp_path / "sweeps" / "tb").read()["points"]:
        curves = scalars(run_folder(tmp_path, "tb", point["identity"]))
        metrics = metrics_of(tmp_path, "align", point["stages"]["align"])
        for name in metrics[0].keys() - {"step"}:
            expected = [(row["step"], pytest.approx(row[name], rel=1e-6)) for row in metrics]  # stored in float32
            assert curves[f"train/{name}"] == expected
        result = read_json(tmp_path / "store" / "evaluate" / point["identity"] / "result.json")
        assert curves["quality/value"] == [(7, pytest.approx(result["quality"]["value"]))]
    files = {path: path.stat().st_size for path in tmp_path.glob("tensorboard/**/*") if path.is_file()}
    assert len(files) == 6, "two points, sft, reference, baseline, and the sweep"
    assert run(None, *arguments).returncode == 0
    assert {path: path.stat().st_size for path in tmp_path.glob("tensorboard/**/*") if path.is_file()} == files


@pytest.mark.slow
def test_a_killed_run_continues_in_the_same_folder_without_a_step_twice(tmp_path):
    long = [*SMALL, "trainer.align.epochs=30", f"output_dir={tmp_path}", "tracking=tensorboard"]
    process = subprocess.Popen(command(*long), cwd=ROOT, env=shell(), start_new_session=True)

    def num_steps():
        return sum(len(scalars(folder).get("train/rewards/margins", [])) for folder in tmp_path.glob("tensorboard/*"))

    wait_until(lambda: num_steps() >= 3, 120, "live training curves")
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    assert run(None, *long).returncode == 0
    (folder,) = (path for path in tmp_path.glob("tensorboard/*") if "dpo" in path.name)
    assert len(list(folder.glob("events.out.tfevents.*"))) == 2
    assert [step for step, _ in scalars(folder)["train/loss"]] == list(range(240))


@pytest.mark.slow
def test_it_stays_complete_when_wandb_beside_it_fails(tmp_path):
    with wandb_server.serving() as server:
        server.refuse = 429
        both = ["tracking=wandb", "tracking.tensorboard.enabled=true"]
        done = run(server, *SMALL, f"output_dir={tmp_path}", *both)
        assert done.returncode == 0 and done.stderr.count("warning: upload incomplete (W&B: ") == 1
        (align,) = (path.parent.name for path in (tmp_path / "store" / "align").glob("*/DONE"))
        (folder,) = (path for path in tmp_path.glob("tensorboard/*") if "dpo" in path.name)
        assert len(scalars(folder)["train/loss"]) == len(metrics_of(tmp_path, "align", align))
        server.refuse = None
        done = run(server, str(tmp_path), module="sweeps.wandb_sync")
        assert done.returncode == 0 and "4 of 8 runs uploaded, 4 were there" in done.stdout


def test_planning_and_training_import_no_tracker(tmp_path):
    code = "import json, sys, src.train, sweeps.search.search, src.stages.align\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=shell(), capture_output=True, text=True, check=True
    )
    assert {"wandb", "tensorboard"}.isdisjoint(json.loads(done.stdout))
