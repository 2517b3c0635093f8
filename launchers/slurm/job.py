"""The functions that SLURM jobs run: `run_task` computes stages, `run_aggregation` finalizes the sweep.

That of jobs with several points is `launchers/slurm/point_pool.py:run_points`.
"""

from __future__ import annotations

import contextlib
import logging
import os
import pkgutil
import signal
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from submitit import JobEnvironment
from submitit.helpers import TorchDistributedEnvironment

from launchers.slurm import cluster
from launchers.slurm.job_records import Task, read_submission
from launchers.slurm.status import failed_points
from src import preemption
from src.errors import describe_failure
from src.planning.stage import Stage
from src.preemption import Interrupted
from src.progress import RunProgress
from src.store.retention import release_models
from src.tracking.sync_process import sync_sweep

EXIT_REQUEUE = 75  # exit code of a stopped job that asks to be requeued (EX_TEMPFAIL of sysexits.h)
LINE_SECONDS = 60.0  # between lines of progress in a job's output
UPLOAD_TIMEOUT = 1800.0  # seconds that the aggregation job waits for its trackers
STARTUP_JITTER = 0.15  # seconds per job over which array tasks spread their first requests to a tracker
NEAR_TIME_LIMIT = "the time limit is near"  # reason of a stop

# Below the ports that Linux gives to outgoing connections.
_PORTS = range(20_000, 32_000)

log = logging.getLogger(__name__)


def run_task(stages: Sequence[Stage], folder: Path, index: int, upload: str) -> None:
    """Compute the stages of task `index` of the submission in `folder`, in order; run by every process of the job.

    Stages resume from their checkpoints. An exception is written to the task's status and re-raised, so that the state
    in SLURM is FAILED. On USR2 (near the time limit) and TERM the running stage saves a checkpoint and the job exits
    with EXIT_REQUEUE.
    """
    submission = read_submission(folder)
    task, store = submission.tasks[index], submission.sweep.store
    with report_status(task):
        _init_distributed_from_slurm(stages[0].point.engine.strategy)

        # torch is imported in jobs, not in the command that submits them.
        from src.distributed import destroy_distributed
        from src.model.loading import set_cpu_threads
        from src.stages.runner import compute_or_wait

        set_cpu_threads(stages[0].point.engine.cpu_threads)
        if rank() == 0:  # the others follow it
            # The signal was asked for before anybody had measured a save; a requeued job has the same one again.
            preemption.set_time_limit(cluster.seconds_left(JobEnvironment().job_id), NEAR_TIME_LIMIT)
        targets = {identity for _, identity in task.stages}
        log_file, jitter = folder / f"tracking-{index}.log", STARTUP_JITTER * len(submission.tasks)
        sync = sync_sweep(submission.sweep, log_file, stages=targets, startup_jitter=jitter)
        with sync, RunProgress(LINE_SECONDS) as report:
            if rank() == 0 and upload == "during":
                sync.start()
            for stage in stages:
                # A job that only aligns does so for one that samples, which has fewer GPUs and cannot train.
                compute_or_wait(stage, store, report, with_weights=stage is stages[-1] and stage.kind == "align")
                if rank() == 0 and stage.kind == "evaluate":
                    release_models(submission.sweep, {stage.identity})
        destroy_distributed()


def _init_distributed_from_slurm(strategy: str) -> None:
    """Set rank and rendezvous of a job with several processes from SLURM's variables, and join the process group."""
    if int(os.environ["SLURM_NTASKS"]) == 1:
        return
    from src.distributed import init_distributed

    # A port that no other job on the node uses.
    os.environ["MASTER_PORT"] = str(_PORTS.start + int(os.environ["SLURM_JOB_ID"]) % len(_PORTS))
    # A process takes the GPU of its local rank, among those that SLURM gave the job.
    TorchDistributedEnvironment().export(set_cuda_visible_devices=False, overwrite=True)
    if os.environ.get("SLURM_JOB_NUM_NODES") == "1":
        os.environ["MASTER_ADDR"] = "localhost"  # a node need not resolve its own name
    init_distributed(strategy)


def rank() -> int:
    """Return the rank of this process in its job."""
    return int(os.environ.get("SLURM_PROCID", "0"))


def run_aggregation(folder: Path) -> None:
    """Finalize the sweep that the submission in `folder` belongs to, once its jobs have ended. Raises SweepFailed."""
    if rank() != 0:
        return
    submission = read_submission(folder)
    sweep = submission.sweep
    with report_status(submission.tasks[0]):
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # only cancelled when another aggregation replaces it
        if [point["identity"] for point in sweep.read()["points"]] != submission.results:
            log.warning("the sweep has other points by now: nothing to aggregate")
            return
        # Nobody waits for this job, so trackers get the time they need. With upload=after it uploads everything.
        with sync_sweep(sweep, folder / "tracking.log", timeout=UPLOAD_TIMEOUT) as sync:
            sync.start()
            pkgutil.resolve_name(submission.finalize)(sweep.path, failed_points(sweep))


@contextlib.contextmanager
def report_status(task: Task) -> Iterator[None]:
    """Keep the status of a task up to date: running, then done, stopped or failed and why.

    Rank 0 writes it, and any process that fails first.
    """
    set_up_process()
    is_main_process, status = rank() == 0, status_at_start(task)
    if is_main_process:
        task.write_status({**status, "state": "running"})
    try:
        yield
    except Interrupted as error:
        log.warning("%s; to be requeued", error)
        # TERM also comes when another process of the job has failed, whose error stands then.
        if is_main_process and task.status().get("state") != "failed":
            status |= {"state": "stopped", "reason": str(error)}
            task.write_status({**status, "near_time_limit": error.reason == NEAR_TIME_LIMIT})
        # The bad exit of one process ends the others at once: only rank 0, which saves the checkpoint, may exit so.
        sys.exit(EXIT_REQUEUE if is_main_process else 0)
    except Exception as error:
        with contextlib.suppress(OSError):  # a full disk must not hide the error
            if task.status().get("state") == "running":  # the first failure is the cause of the others
                prefix = "" if is_main_process else f"process {rank()}: "
                task.write_status({**status, "state": "failed", "error": prefix + describe_failure(error)})
        raise
    if is_main_process:
        task.write_status({**status, "state": "done"})


def set_up_process() -> None:
    """Prepare a process of a job: its signals, its log, and what an earlier run of it has left."""
    # submitit's own handlers would requeue the job before a checkpoint is saved.
    for signum in (signal.SIGUSR2, signal.SIGTERM):
        signal.signal(signum, _request_stop)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", force=True)
    logging.getLogger("submitit").setLevel(logging.WARNING)
    logging.captureWarnings(True)
    _remove_partial_result()


def status_at_start(task: Task) -> dict[str, Any]:
    """Return what the status of a task says of the run of its job that begins now."""
    previous = task.status()
    return {
        **{key: previous[key] for key in ("stalled_runs", "progress_marker") if key in previous},
        "host": os.uname().nodename,
        "job": os.environ.get("SLURM_JOB_ID"),
        "node": os.environ.get("SLURMD_NODENAME"),
        "cuda_visible_devices": os.environ.get("CUDA_VISIBLE_DEVICES"),
        "starts": previous.get("starts", 0) + 1,
        "started": time.time(),
    }


def _remove_partial_result() -> None:
    """Delete the result file that a killed run of this job left half-written; submitit refuses to overwrite it."""
    with contextlib.suppress(OSError, RuntimeError):
        result = JobEnvironment().paths.result_pickle
        result.with_suffix(result.suffix + ".save_tmp").unlink(missing_ok=True)


def _request_stop(signum: int, frame: Any) -> None:
    preemption.request(NEAR_TIME_LIMIT if signum == signal.SIGUSR2 else "SLURM preempts or ends the job")
