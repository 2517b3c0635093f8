"""Jobs on a real SLURM cluster that are killed, preempted or starved: they recover, or fail with a reason."""

import json
import shutil

from tests.support.artifacts import results
from tests.support.commands import train
from tests.support.on_slurm import (
    FOUR_POINTS,
    LONG,
    SLURM,
    TIMEOUT_S,
    job_of,
    newest_step,
    run_tool,
    status_of,
    sweep,
    wait_finished,
    wait_queue_empty,
)
from tests.support.waiting import wait_until


def wait_for_checkpoint(output_dir) -> None:
    """Wait for a checkpoint that is newer than the newest one now."""
    step = newest_step(output_dir)
    wait_until(lambda: newest_step(output_dir) > step, TIMEOUT_S, "another checkpoint")


def test_kills_requeues_preemption_and_the_time_limit_leave_results_unchanged(slurm, local_long_run, tmp_path):
    arguments = ["-m", "method=dpo", "beta=0.1", *LONG, "sweep.name=hit", "hydra.launcher.partition=preempt"]
    train(*arguments, *SLURM, f"output_dir={tmp_path}")
    folder = sweep(tmp_path, "hit")
    job = job_of(folder, "align")

    def interrupt(*command: str) -> None:
        """Run the command once the alignment has a new checkpoint, and wait until the job has started again."""
        wait_for_checkpoint(tmp_path)
        starts = status_of(folder, job)["starts"]
        slurm.run(*command)
        wait_until(lambda: status_of(folder, job)["starts"] == starts + 1, TIMEOUT_S, "the job to start again")

    interrupt("scancel", "--signal=KILL", f"{job}.0")
    assert status_of(folder, job)["progress_marker"][1] > 0, "the marker names the checkpoint that survived the kill"
    interrupt("scancel", "--signal=USR2", job)  # as sbatch --signal does before the time limit
    status = run_tool("status", folder)
    assert status.returncode == 0 and "1 running" in status.stdout and "/256" in status.stdout
    interrupt("scontrol", "requeue", job)
    interrupt("sbatch", "-p", "gpu", "-N", "2", "--exclusive", "-t", "1", "-o", "/dev/null", "--wrap", "sleep 1")
    slurm.run("scontrol", "requeuehold", job)  # nothing else is written while a checkpoint is damaged
    state = ("squeue", "-h", "-j", job, "-o", "%t")
    wait_until(lambda: slurm.run(*state).strip() == "PD", TIMEOUT_S, "the job to be held")
    newest = max((tmp_path / "store").glob("align/.work/*/checkpoints/*/step-*/__0_0.distcp"))
    with newest.open("r+b") as handle:
        handle.seek(newest.stat().st_size // 2)
        handle.write(b"\xff" * 64)
    slurm.run("scontrol", "release", job)
    wait_finished(folder)
    assert folder.read()["state"] == "done"
    assert results(tmp_path) == results(local_long_run)
    log = "".join(path.read_text() for path in folder.jobs.glob(f"*/{job}_0_log.err"))
    assert "is corrupted" in log and "falling back to the previous one" in log
    assert "stopped at" in log and "resuming from step" in log


def test_a_job_that_never_advances_fails_with_a_reason(slurm, tmp_path):
    (tmp_path / "sitecustomize.py").write_text(
        "import os, signal, sys\nif 'submitit.core._submit' in sys.orig_argv: os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    killer = f"hydra.launcher.kinds.sft.setup=['export PYTHONPATH={tmp_path}']"
    train(*FOUR_POINTS, *SLURM, killer, f"output_dir={tmp_path}")
    folder = sweep(tmp_path, "four")
    wait_finished(folder)
    (error,) = {point["error"] for point in folder.read()["points"]}
    assert "killed (exit code 137) 5 times without progress" in error
    wait_queue_empty(slurm)


def test_the_status_of_a_job_that_cannot_start_names_its_log_and_quotes_it(slurm, tmp_path):
    broken = "hydra.launcher.kinds.sft.environment.PYTHONHOME=/nowhere"
    train(*FOUR_POINTS, *SLURM, broken, f"output_dir={tmp_path}")
    folder = sweep(tmp_path, "four")
    wait_finished(folder)
    status = " ".join(run_tool("status", folder).stdout.split())
    assert "job ended without a result (FAILED in sacct)" in status
    (log,) = folder.jobs.glob(f"*/{job_of(folder, 'sft')}_0_log.err")
    lines = log.read_text().strip().splitlines()
    assert any("No module named 'encodings'" in line for line in lines), "the log has the cause"
    assert f"log: {log}" in status and " ".join(lines[-1].split()) in status


def test_processes_of_a_stopped_job_wait_for_rank_0_to_save(slurm, local_long_run, tmp_path):
    # A checkpoint that takes longer than SLURM waits for the other processes of a step once one has ended.
    slow = tmp_path / "slow"
    slow.mkdir()
    (slow / "sitecustomize.py").write_text(
        "import os, shutil, time\n"
        "copy = shutil.copy\n"
        "def slow(*a, **k):\n"
        "    if '/checkpoints/' in str(a[1]) and '/.draft' in str(a[1]): time.sleep(12)\n"
        "    return copy(*a, **k)\n"
        "shutil.copy = slow\n"
    )
    training = [*LONG, "trainer.checkpoint_minutes=1000", "engine=ddp", "sweep.name=stop"]
    jobs = [
        "hydra.launcher.kinds.align.gpus_per_node=2",
        f"hydra.launcher.kinds.align.setup=['export PYTHONPATH={slow}']",
    ]
    output_dir = tmp_path / "out"
    shutil.copytree(local_long_run / "store" / "sft", output_dir / "store" / "sft")
    train("-m", "method=dpo", "beta=0.1", *training, *SLURM, *jobs, f"output_dir={output_dir}")
    folder = sweep(output_dir, "stop")
    job = job_of(folder, "align")

    def progress() -> int:
        files = list((output_dir / "store").glob("align/.work/*/progress.json"))
        return json.loads(files[0].read_text())["step"] if files else 0

    wait_until(lambda: progress() > 0, TIMEOUT_S, "the first step")
    slurm.run("scancel", "--signal=USR2", job)
    wait_until(lambda: status_of(folder, job)["state"] != "running", TIMEOUT_S, "the job to stop")
    assert status_of(folder, job)["state"] in ("stopped", "requeued"), status_of(folder, job)
    assert newest_step(output_dir) > 0, "the checkpoint was saved before the job stopped"
    wait_until(lambda: status_of(folder, job).get("progress_marker"), TIMEOUT_S, "the requeue")
    assert status_of(folder, job)["progress_marker"][1] == newest_step(output_dir)
