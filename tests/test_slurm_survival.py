"""Jobs on a real SLURM cluster (loopback) under blows: what survives, and what ends with a clear state."""

import json
import shutil
import subprocess

import pytest
from safetensors.torch import load_file

from tests.support.artifacts import results
from tests.support.commands import SMALL, train
from tests.support.on_slurm import (
    FOUR,
    LONG,
    SLURM,
    finished,
    queue,
    said,
    step_of,
    submissions,
    sweep_json,
    tool,
    until,
)


def test_kills_requeues_preemption_and_the_time_limit_change_nothing(slurm, undisturbed, tmp_path):
    arguments = ["-m", "method=dpo", "beta=0.1", *LONG, "sweep.name=hit", "hydra.launcher.partition=preempt"]
    train(*arguments, *SLURM, f"output_dir={tmp_path}")
    folder = tmp_path / "sweeps" / "hit"
    job = submissions(folder)["point"]["tasks"][0]["job"]

    def task() -> dict:
        return next((t for t in said(folder) if t["job"] == job), {})

    def strike(*command: str) -> None:
        """When the alignment has a checkpoint it had not before."""
        before = step_of(tmp_path)
        until(lambda: step_of(tmp_path) > before)
        starts = task()["starts"]
        slurm.run(*command)
        until(lambda: task()["starts"] == starts + 1)

    strike("scancel", "--signal=KILL", f"{job}.0")
    assert task()["mark"][1] > 0, "the kill was noted with what was safe on disk"
    strike("scancel", "--signal=USR2", job)  # as --signal does before the time limit
    status = tool("status", folder)
    assert status.returncode == 0 and "1 running" in status.stdout and "/256" in status.stdout
    strike("scontrol", "requeue", job)
    strike("sbatch", "-p", "gpu", "-N", "2", "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1")
    before = step_of(tmp_path)
    until(lambda: step_of(tmp_path) > before)
    newest = max((tmp_path / "store").glob("align/.work/*/checkpoints/*/step-*/model.safetensors"))
    damaged = newest.stat().st_size // 2
    with newest.open("r+b") as handle:
        handle.seek(damaged)
        handle.write(b"\xff" * 64)
    slurm.run("scancel", "--signal=KILL", f"{job}.0")
    until(lambda: finished(folder))
    assert sweep_json(folder)["state"] == "done"
    assert results(tmp_path) == results(undisturbed)
    log = "".join(p.read_text() for p in folder.glob(f"jobs/*/{job}_0_log.err"))
    assert "is not what was written; going on from the one before" in log
    assert "stopped at" in log and "resuming from step" in log


def test_a_job_that_never_advances_is_stopped_with_a_clear_state(slurm, tmp_path):
    killer = "hydra.launcher.kinds.sft.setup=['(sleep 0.5; scancel --signal=KILL $SLURM_JOB_ID.0) &']"
    train(*FOUR, *SLURM, killer, f"output_dir={tmp_path}")
    folder = tmp_path / "sweeps" / "four"
    until(lambda: finished(folder))
    errors = {point["error"] for point in sweep_json(folder)["points"]}
    assert len(errors) == 1
    (error,) = errors
    assert "was killed (exit code 137) 5 times in a row without progress" in error
    until(lambda: not queue(slurm), 10)


def test_a_job_that_cannot_start_says_where_to_look(slurm, tmp_path):
    broken = "hydra.launcher.kinds.sft.environment.PYTHONHOME=/nowhere"
    train(*FOUR, *SLURM, broken, f"output_dir={tmp_path}")
    folder = tmp_path / "sweeps" / "four"
    until(lambda: finished(folder))
    status = tool("status", folder)
    assert "its job ended without a result: SLURM says FAILED" in status.stdout
    assert "No module named 'encodings'" in status.stdout or "Python" in status.stdout


def test_two_processes_of_a_job_train_one_point_as_one_process_does(slurm, calm, tmp_path):
    arguments = ["-m", "method=dpo", "beta=0.1", *SMALL, "engine=ddp", "sweep.name=two"]
    alone = train(*arguments, *SLURM, "hydra.launcher.gpus_per_node=2", "engine=single", check=False)
    assert alone.returncode == 2 and "choose engine=ddp" in alone.stderr
    gpus = ["hydra.launcher.gpus_per_node=2", "hydra.launcher.wait=true"]
    train(*arguments, *SLURM, *gpus, f"output_dir={tmp_path}")
    (two,) = (tmp_path / "store").glob("align/*/model.safetensors")
    one = calm / two.relative_to(tmp_path)
    weights, expected = load_file(two), load_file(one)
    assert (
        max(float((weights[name] - expected[name]).abs().max()) for name in expected) < 3e-4
    )  # 8 steps of Adam at 1e-3
    points = [t for t in said(tmp_path / "sweeps" / "two") if (t["cuda_visible_devices"] or "").count(",") == 1]
    assert points, "a job had two GPUs"
    metrics = [json.loads(line) for line in (two.parent / "metrics.jsonl").read_text().splitlines()]
    wanted = [json.loads(line) for line in (one.parent / "metrics.jsonl").read_text().splitlines()]
    assert [m["step"] for m in metrics] == [m["step"] for m in wanted]
    for name in ("loss", "reward_accuracy", "reward_margin", "grad_norm"):
        assert [m[name] for m in metrics] == pytest.approx([m[name] for m in wanted], abs=1e-4)


def test_processes_of_a_job_told_to_stop_wait_for_the_one_that_saves(slurm, undisturbed, tmp_path):
    # A checkpoint that takes longer than SLURM leaves the processes of a step of which one has ended.
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import os, shutil, time\n"
        "copy = shutil.copy\n"
        "def slow(*a, **k):\n"
        "    if '/checkpoints/.draft' in str(a[1]): time.sleep(12)\n"
        "    return copy(*a, **k)\n"
        "shutil.copy = slow\n"
    )
    arguments = [
        "-m",
        "method=dpo",
        "beta=0.1",
        *LONG,
        "trainer.save_steps=10000",
        "engine=ddp",
        "sweep.name=stop",
    ]
    gpus = [
        "hydra.launcher.kinds.align.gpus_per_node=2",
        f"hydra.launcher.kinds.align.setup=['export PYTHONPATH={slow}']",
    ]
    shutil.copytree(undisturbed / "store" / "sft", tmp_path / "out" / "store" / "sft")
    train(*arguments, *SLURM, *gpus, f"output_dir={tmp_path / 'out'}")
    folder = tmp_path / "out" / "sweeps" / "stop"
    job = submissions(folder)["point"]["tasks"][0]["job"]

    def progress() -> int:
        files = list((tmp_path / "out" / "store").glob("align/.work/*/progress.json"))
        return json.loads(files[0].read_text())["step"] if files else 0

    until(lambda: progress() > 0)
    slurm.run("scancel", "--signal=USR2", job)
    until(lambda: next(t for t in said(folder) if t["job"] == job)["state"] != "running")
    task = next(t for t in said(folder) if t["job"] == job)
    assert task["state"] in ("stopped", "requeued"), task
    until(lambda: step_of(tmp_path / "out") > 0, 10)
    until(lambda: next(t for t in said(folder) if t["job"] == job).get("mark"), 20)
    assert next(t for t in said(folder) if t["job"] == job)["mark"][1] == step_of(tmp_path / "out")


def test_a_full_disk_is_named_and_the_same_command_goes_on_with_more_space(slurm, tmp_path):
    disk = tmp_path / "disk"
    disk.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "size=12m", "tmpfs", str(disk)], check=True)
    try:
        arguments = ["-m", "method=dpo", "beta=0.1", *SMALL, "trainer.save_steps=1", "sweep.name=full"]
        train(*arguments, *SLURM, f"output_dir={disk}")
        folder = disk / "sweeps" / "full"
        until(lambda: "disk full while computing" in tool("status", folder).stdout)
        until(lambda: not queue(slurm))
        subprocess.run(["mount", "-o", "remount,size=200m", str(disk)], check=True)
        train(*arguments, *SLURM, "hydra.launcher.wait=true", f"output_dir={disk}")
        assert sweep_json(folder)["state"] == "done"
    finally:
        until(lambda: not queue(slurm))
        subprocess.run(["umount", "-l", str(disk)], check=True)
