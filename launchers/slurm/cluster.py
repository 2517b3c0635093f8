"""The calls to SLURM's commands: sbatch --test-only, squeue, sacct, scancel and scontrol."""

from __future__ import annotations

import contextlib
import os
import random
import re
import shutil
import subprocess
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

from submitit.slurm.slurm import SlurmInfoWatcher

from src.errors import ConfigError, StageError

RETRY_SECONDS = 30.0  # how long a command is retried while the controller does not answer
COMMAND_TIMEOUT_S = 60.0
DEFAULT_MAX_ARRAY_SIZE = 1001  # SLURM's default


class SlurmUnavailable(StageError):
    """SLURM's controller does not answer, so the states of jobs are unknown."""


@dataclass(frozen=True)
class QueuedJob:
    """A line of squeue: a job, or one task of a job array, that has not ended."""

    id: str  # 123, or 123_4
    name: str
    state: str  # PENDING, RUNNING, COMPLETING ...
    reason: str


def check_commands() -> None:
    """Raise ConfigError when SLURM's commands are not installed on this machine."""
    for program in ("sbatch", "squeue", "scancel", "srun"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"hydra/launcher=slurm: {program} not found; run this on a submit host of the cluster"
                " (to run on this machine: hydra/launcher=local)"
            )


def check_request(kind: str, options: dict[str, object]) -> None:
    """Ask SLURM whether a job with these options could run (`sbatch --test-only`); raise ConfigError if not."""
    command = ["sbatch", "--test-only", *flags(options), "--wrap", "true"]
    with clean_environment(options):
        process = _run(command)
    if process.returncode != 0:
        raise ConfigError(
            f"hydra.launcher: SLURM rejects the {kind} job ({_one_line(process.stderr)}); requested: "
            f"{' '.join(command[2:-2])}"
        )


@contextlib.contextmanager
def clean_environment(options: dict[str, object]) -> Iterator[None]:
    """Drop SBATCH_*, SLURM_* and torchrun variables that would override our options or leak the surrounding job's."""
    reserved = {"TIMELIMIT", "SIGNAL", "REQUEUE", "NO_REQUEUE", "WAIT", "EXPORT", "JOB_NAME", "OPEN_MODE", "ARRAY_INX"}
    reserved |= {key.upper().replace("-", "_") for key in options}
    torchrun = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    environment = dict(os.environ)
    for name in environment:
        is_job_variable = name.startswith("SLURM_") and name != "SLURM_CONF"
        is_override = name.startswith("SBATCH_") and name.removeprefix("SBATCH_") in reserved
        if is_job_variable or is_override or name in torchrun:
            del os.environ[name]
    try:
        yield
    finally:
        os.environ |= environment


def flags(options: dict[str, object]) -> list[str]:
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]


def max_array_size() -> int:
    """Return the site's MaxArraySize: the largest number of tasks of one job array."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run_with_retries(["scontrol", "show", "config"]), re.M)
    return int(match[1]) if match else DEFAULT_MAX_ARRAY_SIZE


def queue() -> dict[str, QueuedJob]:
    """Return this user's pending and running jobs by id, one entry per array task. Raises SlurmUnavailable."""
    output = _run_with_retries(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%j"])
    rows = [line.split("|", 3) for line in output.splitlines()]
    return {row[0]: QueuedJob(row[0], row[3], row[1], row[2]) for row in rows if len(row) == 4}


def sacct_states(jobs: Iterable[str]) -> dict[str, str]:
    """Return the last state of each job by id (FAILED, CANCELLED, TIMEOUT ...), as far as accounting knows it.

    Accounting lags some seconds behind, and a site may have none: a job that is missing here may have any state.
    """
    masters = sorted({job.partition("_")[0] for job in jobs})
    if not masters or shutil.which("sacct") is None:
        return {}
    process = _run(["sacct", "-X", "-o", "JobID,State,NodeList", "--parsable2", "-j", ",".join(masters)])
    if process.returncode != 0:
        return {}
    info = SlurmInfoWatcher(delay_s=0).read_info(process.stdout)  # expands ranges of array tasks (`12_[3-7%2]`)
    return {job: row["State"].partition(" ")[0] for job, row in info.items()}


def cancel(jobs: Iterable[str]) -> None:
    """Cancel jobs; jobs that have ended already are ignored. Raises StageError with SLURM's message."""
    if jobs := sorted(jobs):
        process = _run(["scancel", "--quiet", *jobs])
        if process.returncode != 0 and "Invalid job id" not in process.stderr:
            raise StageError(f"scancel: {_one_line(process.stderr)}")


def state_of(job: str) -> str | None:
    """Return the state of a job or array task; None when it has left the queue. Raises SlurmUnavailable."""
    output = _run_with_retries(["squeue", "--noheader", "--jobs", job, "--format=%T"], empty_error="Invalid job id")
    return output.split()[0] if output.strip() else None


def requeue(job: str) -> None:
    """Requeue a job. Raises SlurmUnavailable with SLURM's message when it still refuses after RETRY_SECONDS."""
    _run_with_retries(["scontrol", "requeue", job])


def _run_with_retries(command: list[str], empty_error: str | None = None) -> str:
    """Return the output of a command, which a busy or restarting controller may not answer at first.

    empty_error: an error message that means an empty result. Raises SlurmUnavailable after RETRY_SECONDS.
    """
    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        process = _run(command)
        if process.returncode == 0:
            return process.stdout
        if empty_error is not None and empty_error in process.stderr:
            return ""
        if time.monotonic() > deadline:
            message = _one_line(process.stdout + process.stderr)
            raise SlurmUnavailable(f"SLURM does not answer ({' '.join(command[:2])}: {message}); try again")
        time.sleep(random.uniform(0.5, 2))  # hundreds of jobs may ask at once


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ConfigError(f"{command[0]} not found; run this on a submit host of the cluster") from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {COMMAND_TIMEOUT_S:g} s")


def _one_line(text: str) -> str:
    return " ".join(text.split())
