"""Everything this project asks of SLURM's commands: what is there, what runs, what became of it."""

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

from src.errors import ConfigError, StageError

PATIENCE_SECONDS = 30.0  # with a controller that does not answer
DEFAULT_MAX_ARRAY = 1001  # SLURM's own


class SlurmUnavailable(StageError):
    """SLURM's controller does not answer, so nothing can be said about jobs."""


@dataclass(frozen=True)
class Queued:
    """A job, or one task of an array, that is still SLURM's business."""

    id: str  # 123, or 123_4
    name: str
    state: str  # PENDING, RUNNING, COMPLETING ...
    reason: str


def check_there() -> None:
    """Raises ConfigError when SLURM's commands are not on this machine."""
    for program in ("sbatch", "squeue", "scancel", "srun"):
        if shutil.which(program) is None:
            raise ConfigError(
                f"hydra/launcher=slurm: there is no {program} here; run this on a submit host of the cluster"
                " (to run on this machine: hydra/launcher=local)"
            )


def check_request(kind: str, options: dict[str, object]) -> None:
    """Ask SLURM whether such a job could ever run (`sbatch --test-only`). Raises ConfigError with its answer."""
    command = ["sbatch", "--test-only", *flags(options), "--wrap", "true"]
    with clean_environment(options):
        done = _run(command)
    if done.returncode != 0:
        said = " ".join(done.stderr.split())
        raise ConfigError(
            f"hydra.launcher: SLURM refuses the {kind} job ({said}); asked for: {' '.join(command[2:-2])}"
        )


@contextlib.contextmanager
def clean_environment(options: dict[str, object]) -> Iterator[None]:
    """Without variables that would overrule the options of a submission, or tell its jobs of another job."""
    decided = {"TIMELIMIT", "SIGNAL", "REQUEUE", "NO_REQUEUE", "WAIT", "EXPORT", "JOB_NAME", "OPEN_MODE", "ARRAY_INX"}
    decided |= {key.upper().replace("-", "_") for key in options}
    foreign = {"MASTER_ADDR", "MASTER_PORT", "RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"}
    before = dict(os.environ)
    for name in before:
        other_job = name.startswith("SLURM_") and name != "SLURM_CONF"
        if other_job or name in foreign or (name.removeprefix("SBATCH_") in decided and name.startswith("SBATCH_")):
            del os.environ[name]
    try:
        yield
    finally:
        os.environ |= before


def flags(options: dict[str, object]) -> list[str]:
    return [f"--{key}" if value is True else f"--{key}={value}" for key, value in options.items()]


def max_array_size() -> int:
    """How many tasks one array may have here."""
    found = re.search(r"^MaxArraySize\s*=\s*(\d+)", _patiently(["scontrol", "show", "config"]), re.M)
    return int(found[1]) if found else DEFAULT_MAX_ARRAY


def queue() -> dict[str, Queued]:
    """This user's jobs that have not ended, array tasks each by their own id. Raises SlurmUnavailable."""
    text = _patiently(["squeue", "--me", "--noheader", "--array", "--format=%i|%T|%r|%j"])
    jobs = (Queued(job, name, state, reason) for job, state, reason, name in _rows(text, 4))
    return {job.id: job for job in jobs}


def _rows(text: str, columns: int) -> Iterable[list[str]]:
    for line in text.splitlines():
        parts = line.split("|", columns - 1)
        if len(parts) == columns:
            yield parts


def accounted(jobs: Iterable[str]) -> dict[str, str]:
    """The last known state of each job by id (FAILED, CANCELLED, TIMEOUT ...), as far as accounting has one.

    It lags some seconds behind and a site may have none at all: what is missing is unknown.
    """
    masters = sorted({job.partition("_")[0] for job in jobs})
    if not masters or shutil.which("sacct") is None:
        return {}
    done = _run(["sacct", "-X", "-o", "JobID,State,NodeList", "--parsable2", "-j", ",".join(masters)])
    if done.returncode != 0:
        return {}
    from submitit.slurm.slurm import SlurmInfoWatcher  # it knows how arrays are written (`12_[3-7%2]`)

    info = SlurmInfoWatcher(delay_s=0).read_info(done.stdout)
    return {job: row["State"].partition(" ")[0] for job, row in info.items()}


def cancel(jobs: Iterable[str]) -> None:
    """Ends jobs; those that have ended already are no error."""
    if jobs := sorted(jobs):
        done = _run(["scancel", "--quiet", *jobs])
        if done.returncode != 0 and "Invalid job id" not in done.stderr:
            raise StageError(f"scancel: {' '.join(done.stderr.split())}")


def state_of(job: str) -> str | None:
    """Of one job or array task; None when the queue has it no more. Raises SlurmUnavailable."""
    text = _patiently(["squeue", "--noheader", "--jobs", job, "--format=%T"], known="Invalid job id")
    return text.split()[0] if text.strip() else None


def requeue(job: str) -> None:
    """Raises StageError with SLURM's answer when it will not, not even after a while."""
    _patiently(["scontrol", "requeue", job])


def _patiently(command: list[str], known: str | None = None) -> str:
    """Output of a command that a busy or restarting controller may leave unanswered for a while.

    known: an error that is an answer: nothing. Raises SlurmUnavailable.
    """
    end = time.monotonic() + PATIENCE_SECONDS
    while True:
        done = _run(command)
        if done.returncode == 0:
            return done.stdout
        if known is not None and known in done.stderr:
            return ""
        if time.monotonic() > end:
            said = " ".join((done.stdout + done.stderr).split())
            raise SlurmUnavailable(f"SLURM does not answer ({' '.join(command[:2])}: {said}); try again")
        time.sleep(random.uniform(0.5, 2))  # hundreds of jobs may ask at once


def _run(command: list[str]) -> subprocess.CompletedProcess[str]:
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise ConfigError(f"there is no {command[0]} here; run this on a submit host of the cluster") from None
    except subprocess.TimeoutExpired:
        return subprocess.CompletedProcess(command, 1, "", "no answer in 60 s")
