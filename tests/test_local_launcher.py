"""The worker processes of the local launcher: interrupted, killed, and orphaned by a killed launcher."""

import json
import os
import signal
import subprocess
from pathlib import Path

import pandas as pd
import psutil
import pytest

from launchers.local import LocalLauncher
from src.errors import ConfigError, StageError
from src.estimates.forecast import Forecast
from src.planning.plan import make_plan
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from tests.support.commands import SMALL, start, train
from tests.support.configs import point
from tests.support.kills import stopping_at, wait_until_stopped
from tests.support.waiting import wait_until

CHECKPOINT = "align/.work/*/checkpoints/*/step-*"
SWEEP = ["-m", "method=dpo,ipo", "beta=0.1,1", *SMALL, "dataset.sft_size=64", "hydra.launcher.workers=2"]


def workers_of(launcher: subprocess.Popen[str]) -> list[psutil.Process]:
    """Return the two worker processes: children of the fork server, which is a child of the launcher."""
    children = psutil.Process(launcher.pid).children(recursive=True)
    forked = [child for child in children if any("forkserver" in word for word in child.cmdline())]
    workers = [child for child in forked if child.ppid() != launcher.pid]
    assert len(workers) == 2
    return workers


def is_alive(process: psutil.Process) -> bool:
    return process.is_running() and process.status() != psutil.STATUS_ZOMBIE


def wait_for_alignment(output_dir: Path) -> None:
    checkpoints = lambda: list((output_dir / "store" / "align").glob(".work/*/checkpoints/*/step-*"))  # noqa: E731
    wait_until(checkpoints, 120, "a checkpoint of an alignment")


def states(output_dir: Path, name: str) -> list[str]:
    return list(pd.read_csv(SweepFolder(output_dir / "sweeps" / name).points_csv).state)


@pytest.mark.parametrize("engine", ["zero3", "fsdp"])
def test_a_model_that_only_several_gpus_hold_is_refused_as_each_worker_has_one(engine, monkeypatch, tmp_path):
    def not_here(requests):
        raise StageError("the arithmetic is enough")

    monkeypatch.setattr("src.estimates.forecast.rehearse_all", not_here)
    model = ["setup=llama31_8b_uf", "method=dpo", "beta=0.1", f"engine={engine}", "engine.gpu=h100"]
    plan = make_plan([point(*model)], Store(tmp_path))
    with pytest.raises(ConfigError, match="does not fit on one h100") as refused:
        Forecast(plan, LocalLauncher().num_processes, all_rehearsed=False).check()
    assert f"engine={engine}" in str(refused.value) and "\n" not in str(refused.value)
    Forecast(plan, lambda stage: 8, all_rehearsed=False).check()  # the control: a job of eight GPUs


GROUP = ["engine=ddp", "hydra.launcher.gpus_per_point=2", "hydra.launcher.workers=1", "dataset.sft_size=64"]


@pytest.mark.slow
def test_a_point_of_several_processes_fails_alone_and_a_killed_process_is_replaced(tmp_path):
    points = ["-m", "method=orpo", "beta=1", "lr=1e-3,1e5", *SMALL, *GROUP]  # the second learning rate diverges
    env = stopping_at(CHECKPOINT, 5, once=tmp_path / "stopped")
    launcher = start(*points, "trainer.align.epochs=8", f"output_dir={tmp_path}", "sweep.name=group", env=env)
    leader = wait_until_stopped(launcher)
    (follower,) = set(workers_of(launcher)) - {leader}
    follower.kill()
    os.killpg(launcher.pid, signal.SIGCONT)
    output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 1 and "1 of 2 points failed" in output, output
    assert states(tmp_path, "group") == ["done", "failed"]
    log = (SweepFolder(tmp_path / "sweeps" / "group").logs / "worker-0.log").read_text()
    assert "resuming from step" in log
    records = [json.loads(path.read_text()) for path in (tmp_path / "store").glob("*/*/DONE")]
    assert {r["processes"] for r in records if r["stage"] in ("sft", "align", "generate")} == {2}
    assert {r["processes"] for r in records if r["stage"] == "evaluate"} == {1}


@pytest.mark.parametrize(
    ("gpus", "overrides", "options", "message"),
    [
        (["0", "1"], ["engine=ddp"], {"gpus_per_point": 4}, "gpus_per_point=4: this machine has 2 GPUs"),
        ([], ["engine=single"], {"gpus_per_point": 2}, "but engine=single uses one: choose engine=fsdp, or hydra"),
        ([], ["engine=ddp", "trainer.align.batch_size=2"], {"gpus_per_point": 4}, "align.batch_size=2: below the 4"),
        ([], [], {"gpus_per_point": 0}, "gpus_per_point=0: must be a number from 1 to 1024"),
        ([], [], {"gpus_per_point": None}, "gpus_per_point=None: must be a number from 1 to 1024"),
        ([], [], {"workers": "x"}, "workers=x: must be a number from 1 to 1024, or null"),
        ([], [], {"workers": 512, "gpus_per_point": 4}, "workers=512: 512 x gpus_per_point=4 is more than 1024"),
    ],
)
def test_points_that_cannot_have_so_many_processes_are_refused(
    gpus, overrides, options, message, monkeypatch, tmp_path
):
    monkeypatch.setattr("launchers.local.visible_gpus", lambda: gpus)
    plan = make_plan([point("method=orpo", "beta=1", *overrides)], Store(tmp_path))
    with pytest.raises(ConfigError, match=message) as refused:
        LocalLauncher(**options).check(plan)
    assert "\n" not in str(refused.value)


def test_an_engine_of_one_process_is_refused_also_where_only_samples_are_missing(monkeypatch, tmp_path):
    monkeypatch.setattr("launchers.local.visible_gpus", lambda: ["0", "1"])
    plan = make_plan([point("method=orpo", "beta=1", "engine=single")], Store(tmp_path))
    plan.needed = {identity for identity, stage in plan.stages.items() if not stage.is_training}
    with pytest.raises(ConfigError, match="generate is computed by 2 processes, but engine=single uses one"):
        LocalLauncher(gpus_per_point=2).check(plan)
    LocalLauncher().check(plan)  # the control


def test_a_machine_with_enough_gpus_needs_no_jobs_for_points_of_several(monkeypatch, tmp_path):
    monkeypatch.setattr("launchers.local.visible_gpus", lambda: ["0", "1"])
    launcher = LocalLauncher(gpus_per_point=2)
    plan = make_plan([point("method=orpo", "beta=1", "engine=ddp")], Store(tmp_path))
    launcher.check(plan)
    processes = {stage.kind: launcher.num_processes(stage) for stage in plan.stages.values()}
    assert processes == {"sft": 2, "generate": 2, "align": 2, "evaluate": 1}
    assert launcher.on_gpus(2) == "hydra.launcher.gpus_per_point=2"
    assert launcher.on_gpus(4) == "hydra/launcher=slurm hydra.launcher.gpus_per_node=4"


@pytest.mark.slow
def test_ctrl_c_stops_the_workers_and_the_same_command_resumes(tmp_path):
    arguments = [*SWEEP, "trainer.align.epochs=8", f"output_dir={tmp_path}", "sweep.name=stopped"]
    launcher = start(*arguments)
    wait_for_alignment(tmp_path)
    workers = workers_of(launcher)
    os.killpg(launcher.pid, signal.SIGINT)  # to the whole process group, as a terminal does
    output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 130 and "Run the same command again to resume" in output
    assert "Traceback" not in output
    assert not any(is_alive(worker) for worker in workers)
    train(*arguments)
    assert states(tmp_path, "stopped") == ["done"] * 4


@pytest.mark.slow
@pytest.mark.parametrize("module", ["torch", "src.stages.runner"])
def test_ctrl_c_while_the_workers_start_is_one_line(module, tmp_path):
    """Interrupt the imports of the fork server, and those of a worker."""
    launcher = start(*SWEEP, f"output_dir={tmp_path}", env=stopping_at(module, once=tmp_path / "stopped"))
    wait_until_stopped(launcher)
    os.killpg(launcher.pid, signal.SIGINT)
    os.killpg(launcher.pid, signal.SIGCONT)
    output = launcher.communicate(timeout=300)[0]  # to the end of the fork server, which has the same stderr
    assert launcher.returncode == 130 and "Run the same command again to resume" in output
    assert not any(word in output for word in ("Traceback", "KeyboardInterrupt", "Process ")), output


@pytest.mark.slow
def test_a_killed_worker_is_replaced_and_its_stage_resumes(tmp_path):
    env = stopping_at(CHECKPOINT, 5, once=tmp_path / "stopped")
    launcher = start(*SWEEP, "trainer.align.epochs=8", f"output_dir={tmp_path}", "sweep.name=killed", env=env)
    wait_until_stopped(launcher)
    for worker in workers_of(launcher):
        worker.kill()
    output = launcher.communicate(timeout=300)[0]
    assert launcher.returncode == 0, output
    logs = "".join(path.read_text() for path in SweepFolder(tmp_path / "sweeps" / "killed").logs.iterdir())
    assert "resuming from step" in logs
    assert states(tmp_path, "killed") == ["done"] * 4


@pytest.mark.slow
def test_workers_do_not_outlive_a_killed_launcher(tmp_path):
    # Alignment takes much longer than the timeout below: a worker that only notices at its next stage fails the test.
    launcher = start(*SWEEP, "trainer.align.epochs=2000", f"output_dir={tmp_path}", "sweep.name=orphans")
    wait_for_alignment(tmp_path)
    workers = workers_of(launcher)
    try:
        launcher.kill()
        launcher.wait()
        wait_until(lambda: not any(is_alive(worker) for worker in workers), 20, "the workers to exit")
    finally:
        for worker in filter(is_alive, workers):
            worker.kill()
