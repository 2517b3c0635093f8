"""Commands that stop at a known moment, so that a test can kill them just then.

A test that watches the files of a running command instead comes too late when the machine is busy.
"""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
from pathlib import Path

import psutil

from tests.support.commands import environment, start
from tests.support.waiting import wait_until


def stopping_at(pattern: str, number: int = 1, once: Path | None = None) -> dict[str, str]:
    """Return an environment in which a process stops just before it writes to a path for the Nth time.

    A write is an append to a file, a new folder, or a rename to that path. The import of a module counts as one, too.
    pattern: of the last components of the path, or of the module's name, as `PurePath.match` takes it. Every process
    that is started in the environment counts for itself. once: the path of a file that the first process to stop
    creates; no other one stops then.
    """
    marker = {} if once is None else {"STOP_MARKER": str(once)}
    return _watched(pattern) | {"STOP_NUMBER": str(number)} | marker


def slowed(pattern: str, seconds: float) -> dict[str, str]:
    """Return an environment in which every write to such a path (see `stopping_at`) takes so many seconds longer."""
    return _watched(pattern) | {"STOP_SECONDS": str(seconds)}


def _watched(pattern: str) -> dict[str, str]:
    folder = Path(__file__).with_name("stopping")
    return environment() | {"PYTHONPATH": str(folder), "STOP_PATTERN": pattern}


def wait_until_stopped(command: subprocess.Popen[str]) -> psutil.Process:
    """Return the process that has stopped, of the command and those it has started; fail if the command ends."""
    wait_until(lambda: _stopped(command) or command.poll() is not None, 300, "the command to stop")
    process = _stopped(command)
    assert process is not None, f"the command has ended instead of stopping: {command.communicate()[0]}"
    return process


def _stopped(command: subprocess.Popen[str]) -> psutil.Process | None:
    with contextlib.suppress(psutil.NoSuchProcess):  # it has ended while it was looked at
        root = psutil.Process(command.pid)
        for process in (root, *root.children(recursive=True)):
            if process.status() == psutil.STATUS_STOPPED:
                return process
    return None


def kill_at(pattern: str, number: int, *arguments: str) -> None:
    """Start `python -m src.train ARGUMENTS` and kill -9 all its processes as soon as one stops: see `stopping_at`."""
    process = start(*arguments, env=stopping_at(pattern, number))
    wait_until_stopped(process)
    os.killpg(process.pid, signal.SIGKILL)
    process.communicate()
