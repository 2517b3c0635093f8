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

from submitit.helpers import clean_env
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
    state: str  # PENDING, RUNNING, COMPLETING ...
    reason: str
    name: str


def check_request(kind: str, options: dict[str, object]) -> None:
    """Ask SLURM whether a job with these options could run (`sbatch --test-only`); raise ConfigError if not."""
    flags = [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]
    with clean_environment(options):
        process = _run(["sbatch", "--test-only", *flags, "--wrap", "true"])
    if process.returncode != 0:
        raise ConfigError(
            f"hydra.launcher: SLURM rejects the {kind} job ({_one_line(process.stderr)}); requested: {' '.join(flags)}"
        )


@contextlib.contextmanager
def clean_environment(options: dict[str, object]) -> Iterator[None]:
    """Drop SBATCH_*, SLURM_* and torchrun variables that would override our options or leak the surrounding job's."""
    reserved = {"TIMELIMIT", "SIGNAL", "REQUEUE", "NO_REQUEUE", "WAIT", "EXPORT", "JOB_NAME", "OPEN_MODE", "ARRAY_INX"}
    reserved |= {key.upper().replace("-", "_") for key in options}
    site_variables = {
        name: value
        for name, value in os.environ.items()
        if name == "SLURM_CONF" or (name.startswith("SBATCH_") and name.removeprefix("SBATCH_") not in reserved)
    }
    with clean_env():
        os.environ |= site_variables
        yield


def max_array_size() -> int:
    """Return the site's MaxArraySize: the largest number of tasks of one job array."""
    match = re.search(r"^MaxArraySize\s*=\s*(\d+)", _run_with_retries(["scontrol", "show", "config"]), re.M)
    return int(match[1]) if match else DEFAULT_MAX_ARRAY_SIZE


def queue() -> dict[str, QueuedJob]:
    """Return this user's pending and running jobs by id, one entry per array task. Raises SlurmUnavailable."""
    output = _run_with_retries(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%j"])
    jobs = [QueuedJob(*line.split("|", 3)) for line in output.splitlines()]
    return {job.id: job for job in jobs}


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


def seconds_left(job: str) -> float | None:
    """Return the seconds until the time limit of a running job; None without a limit, or when SLURM does not answer."""
    text = _run(["squeue", "--noheader", f"--jobs={job}", "--format=%L"]).stdout.strip()
    match = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", text, re.ASCII)  # [[days-]hours:]minutes:seconds
    if match is None:
        return None
    days, hours, minutes, seconds = (int(part or 0) for part in match.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + seconds)


def requeue(job: str) -> None:
    """Requeue a job. Raises SlurmUnavailable with SLURM's message when it still refuses after RETRY_SECONDS."""
    _run_with_retries(["scontrol", "requeue", job])


def _run_with_retries(command: list[str]) -> str:
    """Return the output of a command, which a busy or restarting controller may not answer at first.

    Raises SlurmUnavailable after RETRY_SECONDS.
    """
    deadline = time.monotonic() + RETRY_SECONDS
    while True:
        process = _run(command)
        if process.returncode == 0:
            return process.stdout
        if time.monotonic() > deadline:
            message = _one_line(process.stdout + process.stderr)
            raise SlurmUnavailable(f"SLURM does not answer ({' '.join(command[:2])}: {message}); try again")
        time.sleep(random.uniform(0.5, 2))  # hundreds of jobs may ask at once


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_TIMEOUT_S, check=False)
    except FileNotFoundError:
        raise ConfigError(
            f"{command[0]} not found; run this on a submit host of the cluster"
            " (to run on this machine: hydra/launcher=local)"
        ) from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", f"no answer in {COMMAND_TIMEOUT_S:g} s")


def _one_line(text: str) -> str:
    return " ".join(text.split())
