"""A lease keeps two processes from computing one stage, on local and network file systems alike.

Leases are numbered files in a folder; the process that created the highest number holds the lease. Taking over number
n from a dead holder means creating n + 1 exclusively, so of several takers exactly one wins, and a late heartbeat of
the old holder changes nothing. A holder is dead when its process is gone (same machine), when its heartbeat has not
changed for STALE_SECONDS on the observer's own clock (other machines), or when it was an earlier run of the same SLURM
job.

This is not done by a library because those lock with flock or fcntl, which many network file systems do not support
across machines and which a lost node may never release, or they compare time stamps of machines whose clocks differ.
Creation by link is exclusive on NFS, too, and only the observer's clock is used.
"""

from __future__ import annotations

import contextlib
import json
import os
import threading
import time
import uuid
from collections.abc import Callable
from pathlib import Path
from typing import Any

from src.errors import DamagedFile
from src.store.files import NumberedNames, atomic_write, read_json, remove

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0
LEASES = NumberedNames("lease-", 6)


class LeaseLost(RuntimeError):
    """Another process has taken the stage over because the heartbeat of this one stopped."""


def in_use(folder: Path) -> bool:
    """Return whether a process holds the folder; one on another machine counts as alive, however old its heartbeat."""
    _, holder = Lease(folder)._current()
    return holder is not None and not holder.get("released") and not Lease._dead(holder)


def live_holder(folder: Path) -> str | None:
    """Return who holds the folder; None when nobody does.

    A process on another machine is alive when its heartbeat changes: it is watched for STALE_SECONDS at most.
    """
    heartbeat, since = None, time.monotonic()
    while in_use(folder) and time.monotonic() - since <= STALE_SECONDS:
        _, holder = Lease(folder)._current()
        if holder is not None and (holder.get("machine") == _machine() or heartbeat not in (None, holder.get("beat"))):
            return _describe(holder)
        heartbeat = holder and holder.get("beat")
        time.sleep(0.5)
    return None


def _describe(holder: dict[str, Any]) -> str:
    return f"process {holder.get('pid')} on {str(holder.get('machine')).partition('/')[0]}"


def _machine() -> str:
    """Return host, boot and process namespace: process ids are comparable only where all three are equal."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="utf-8").strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{os.uname().nodename}/{boot}/{namespace}"


def _slurm_run() -> tuple[str | None, int]:
    """Return the job id, and how often SLURM had requeued the job before this run of it."""
    count = os.environ.get("SLURM_RESTART_COUNT", "")
    return os.environ.get("SLURM_JOB_ID"), int(count) if count.isascii() and count.isdigit() else 0


def _process_start(pid: int) -> str | None:
    """Return the start time of a process, which differs from that of a later one with the same id; None without one.

    Where there is no /proc it is always None: then a dead holder is known by its heartbeat alone.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        return None
    return None if stat[0] == "Z" else stat[19]


class Lease:
    """`with Lease(folder):` waits until no live process holds the folder, then holds it and keeps a heartbeat.

    waiting: called about once a second while another process holds it, with a text that names the holder; it may
    return True to give up waiting, and then `held` is False inside the block.
    """

    def __init__(self, folder: Path, waiting: Callable[[str], bool] = lambda holder: False) -> None:
        self.folder = folder
        self.waiting = waiting
        self.held = False
        self.token = uuid.uuid4().hex[:12]
        self._stop = threading.Event()
        self._last_beat = 0.0

    def __enter__(self) -> Lease:
        observed: tuple[int, Any] | None = None
        since = time.monotonic()
        while True:
            number, holder = self._current()
            if holder is not None and (number, holder.get("beat")) != observed:
                observed, since = (number, holder.get("beat")), time.monotonic()
            is_stale = time.monotonic() - since > STALE_SECONDS
            if holder is None or holder.get("released") or is_stale or self._dead(holder):
                if self._create(number + 1):
                    break
            elif self.waiting(_describe(holder)):
                return self
            else:
                time.sleep(0.5)
        self.held = True
        self._thread = threading.Thread(target=self._beat_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.held:
            self._stop.set()
            self._thread.join()
            # The folder may be deleted with the finished stage, or the disk full: then the lease goes stale.
            with contextlib.suppress(OSError):
                if LEASES.path(self.folder, self.number).exists():
                    atomic_write(LEASES.path(self.folder, self.number), self._text(released=True))
            self.held = False

    def check(self) -> None:
        """Raise LeaseLost when another process holds the lease. Reads no file while the heartbeat is recent."""
        if time.monotonic() - self._last_beat > STALE_SECONDS / 2 and not self._is_current_holder():
            self._lost = True
        if self._lost:
            raise LeaseLost(f"{self.folder}: another process took this stage over")

    def _current(self) -> tuple[int, dict[str, Any] | None]:
        """Return the highest number and its holder, (0, None) without one.

        A file that cannot be read counts as a holder whose heartbeat does not change.
        """
        while number := self._highest():
            path = LEASES.path(self.folder, number)
            try:
                holder = read_json(path)
            except FileNotFoundError:
                if not path.is_symlink():
                    continue  # the holder of the next number has just removed it
                holder = {}  # a link to nowhere
            except DamagedFile:  # or replaced while a network file system read it
                holder = {}
            is_ours = type(holder.get("pid")) is int and type(holder.get("run", 0)) is int
            return number, holder if is_ours else {"beat": "unreadable"}
        return 0, None

    def _highest(self) -> int:
        return max(LEASES.entries(self.folder), default=0)

    @staticmethod
    def _dead(holder: dict[str, Any]) -> bool:
        if holder.get("machine") == _machine():
            return _process_start(holder["pid"]) != holder.get("start")
        # SLURM requeues a job only when its former run has ended or its node is lost to the cluster.
        job, run = _slurm_run()
        return job is not None and holder.get("job") == job and holder.get("run", 0) < run

    def _create(self, number: int) -> bool:
        """Try to create the lease file of that number; return whether this process did."""
        self.folder.mkdir(parents=True, exist_ok=True)
        self.number, self._lost, self._beats = number, False, 0
        # Written beside it and then linked, because link fails where the name exists and never exposes an empty file.
        draft = self.folder / f".draft-{self.token}"
        try:
            draft.write_text(self._text(), encoding="utf-8")
            os.link(draft, LEASES.path(self.folder, number))
        # Another process was first, or has finished and removed the folder.
        except (FileExistsError, FileNotFoundError):
            return False
        finally:
            draft.unlink(missing_ok=True)
        if self._highest() > number:
            # Between reading and linking, others have taken this number, removed it and taken the next one.
            LEASES.path(self.folder, number).unlink(missing_ok=True)
            return False
        self._last_beat = time.monotonic()
        for old, path in LEASES.entries(self.folder).items():
            if old < number:
                remove(path)
        return True

    def _text(self, **more: object) -> str:
        pid, (job, run) = os.getpid(), _slurm_run()
        holder = {"pid": pid, "start": _process_start(pid), "machine": _machine(), "job": job, "run": run}
        return json.dumps({**holder, "token": self.token, "beat": self._beats, **more})

    def _is_current_holder(self) -> bool:
        number, holder = self._current()
        return number == self.number and holder is not None and holder.get("token") == self.token

    def _beat_forever(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._is_current_holder():
                    self._lost = True
                    return
                self._beats += 1
                atomic_write(LEASES.path(self.folder, self.number), self._text())
                self._last_beat = time.monotonic()
            except OSError:
                continue  # full disk or unreachable server: retry at the next beat, until the lease is stale
