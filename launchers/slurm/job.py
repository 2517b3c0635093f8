"""What a job does once SLURM has started it: the stages of one task, or the conclusion of a sweep."""

from __future__ import annotations

import contextlib
import logging
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from launchers.slurm import job_records as ledger
from src import preemption as preemption
from src.errors import describe_failure
from src.preemption import Interrupted
from src.progress import RunProgress
from src.store.files import write_json
from src.store.store import Store
from src.tracking.following import Following

if TYPE_CHECKING:
    from src.planning.stage import Stage

AGAIN = 75  # exit code: interrupted, to be queued again (EX_TEMPFAIL of sysexits.h)
LINE_SECONDS = 60.0  # between lines of progress in a job's output
PATIENCE = {"during": 120.0, "after": 1800.0}  # seconds that the conclusion waits for W&B at most
JITTER = 0.15  # seconds a job over which those that may begin together spread their first word to W&B

_PORTS = range(20_000, 32_000)

log = logging.getLogger(__name__)


def compute(stages: Sequence[Stage], output_dir: str, folder: str, index: int, wandb: str) -> None:
    """NumericsConfig stages in order, resuming what an earlier run of this job had begun; runs in each of its processes.

    Whatever a stage raises goes on to SLURM, which then says FAILED, and its line to the task's file. On USR2 (the
    time limit is near) and TERM the stage saves what it can resume from and the job asks to be queued again.
    """
    submission, store = ledger.read(Path(folder)), Store(output_dir)
    with speaking(submission, index):
        _meet(stages[0].point.engine.strategy)

        from src.distributed import destroy_distributed
        from src.model.loading import set_cpu_threads
        from src.stages.runner import compute_or_wait

        set_cpu_threads(stages[0].point.engine.cpu_threads)
        own = {identity for _, identity in submission.tasks[index].stages}
        delay = JITTER * len(submission.tasks)
        following = Following(store, Path(folder) / f"wandb-{index}.log", submission.sweep.path, delay)
        with following, RunProgress(LINE_SECONDS) as report:
            if rank() == 0 and wandb == "during":
                following.points([stage.point for stage in stages], own)
            for stage in stages:
                compute_or_wait(stage, store, report)
        if rank() == 0 and stages[0].point.keep_checkpoints == "none":
            # No other point waits for a model that is this task's own; the conclusion would come too late for the disk.
            for stage in stages:
                if stage.kind == "align" and {stage.identity, stages[-1].identity} <= own:
                    store.remove_weights(stage)
        destroy_distributed()


def _meet(parallel: str) -> None:
    """Rank and rendezvous of a job with several processes, from SLURM."""
    if int(os.environ["SLURM_NTASKS"]) == 1:
        return
    from submitit.helpers import TorchDistributedEnvironment

    from src.distributed import init_distributed

    # Of no other job of the node, nor of those that the system gives to outgoing connections.
    os.environ["MASTER_PORT"] = str(_PORTS.start + int(os.environ["SLURM_JOB_ID"]) % len(_PORTS))
    # Which GPU is whose: the local rank, among those SLURM gave the job.
    here = TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if os.environ.get("SLURM_JOB_NUM_NODES") == "1":
        os.environ["MASTER_ADDR"] = "localhost"  # a node's name need not resolve on itself
    joined = init_distributed(parallel)
    assert joined.size == here.world_size, f"{joined.size} processes met, {here.world_size} were started"


def rank() -> int:
    """Of this process among those of the job."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def run_aggregation(folder: Path) -> None:
    """Finalize the sweep that the submission in `folder` belongs to, once its jobs have ended. Raises SweepFailed."""
    from launchers.slurm.status import lost_points

    if rank() != 0:
        return
    submission = ledger.read(folder)
    sweep, wandb = submission.sweep, submission.upload
    with speaking(submission, 0):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # whoever ends this has a better conclusion coming
        now = [point["identity"] for point in sweep.read()["points"]]
        if now != submission.results:
            log.warning("the sweep has other points by now: nothing to conclude")
            return
        # Nobody waits for this job: it gives W&B the time it takes, and without `live` it is the first to tell.
        with Following(sweep.store, folder / "wandb.log", sweep.path, patience=PATIENCE[wandb]) as following:
            try:
                pkgutil.resolve_name(submission.finalize)(sweep.path, lost_points(sweep.path))
            finally:
                if wandb == "after":
                    following.finished_of(sweep.path)
                following.sweep(sweep.path)


@contextlib.contextmanager
def speaking(submission: ledger.Submission, index: int) -> Any:
    """Keeps the task's file true: running, done, stopped or failed and why. Of several processes the first speaks,
    and any that fails."""
    _prepare()
    path, leads = submission.task_file(index), rank() == 0
    before = submission.said(index)
    now = {
        "host": os.uname().nodename,
        "job": os.environ.get("SLURM_JOB_ID"),
        "node": os.environ.get("SLURMD_NODENAME"),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "starts": before.get("starts", 0) + 1,
        "started": time.time(),
        "stalls": before.get("stalls", 0),
        "mark": before.get("mark"),
    }
    if leads:
        write_json(path, {**now, "state": "running"})
    try:
        yield
    except Interrupted as stop:
        log.warning("%s; to be queued again", stop)
        # TERM also comes when another process of the job has failed: that remains what happened.
        if leads and submission.said(index).get("state") != "failed":
            write_json(path, {**now, "state": "stopped", "reason": str(stop), "limit": _near_its_limit})
        sys.exit(AGAIN if leads else 0)  # a bad exit of one process ends the others at once
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not hide what happened
            where = "" if leads else f"process {rank()}: "
            if submission.said(index).get("state") == "running":  # who fails first knows why
                write_json(path, {**now, "state": "failed", "error": where + describe_failure(error)})
        raise
    if leads:
        write_json(path, {**now, "state": "done"})


def _prepare() -> None:
    # submitit's own handlers would queue the job again before anything was saved.
    signal.signal(signal.SIGUSR2, _ask_to_stop)
    signal.signal(signal.SIGTERM, _ask_to_stop)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("submitit").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    _clear_half_written_results()


def _clear_half_written_results() -> None:
    """submitit refuses to write its result beside what an earlier, killed run of this job left half-written."""
    from submitit import JobEnvironment

    with contextlib.suppress(OSError, RuntimeError):
        result = JobEnvironment().paths.result_pickle
        result.with_suffix(result.suffix + ".save_tmp").unlink(missing_ok=True)


_near_its_limit = False  # whether it was the time limit that this job was told to stop for


def _ask_to_stop(signum: int, frame: Any) -> None:
    global _near_its_limit
    _near_its_limit = signum == signal.SIGUSR2
    preemption.request("the time limit is near" if _near_its_limit else "SLURM wants the place back")
