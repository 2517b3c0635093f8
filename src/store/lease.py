"""A lease keeps two jobs from computing one stage, on local and network file systems alike.

Leases are numbered files in a folder; whoever holds the highest number holds the lease. Taking over a dead
holder's number n means creating n + 1 exclusively, so of several takers exactly one wins and a late heartbeat
of the old holder can disturb nobody. A holder is dead when its process is (same machine) or when its
heartbeat has stood still for STALE_SECONDS by the observer's own clock (other machines; no clock is compared), or
when it was an earlier run of the same SLURM job.
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

HEARTBEAT_SECONDS = 5.0
STALE_SECONDS = 60.0


class LeaseLost(RuntimeError):
    """Another process has taken the stage over because this one stopped giving signs of life."""


def in_use(folder: Path) -> bool:
    """Whether somebody holds the folder, as far as one look can tell; a silent holder elsewhere counts as alive."""
    _, holder = Lease(folder)._current()
    return holder is not None and not holder.get("released") and not Lease._dead(holder)


def _machine() -> str:
    """Identifies what process ids mean something to: host, boot and process namespace."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        boot = namespace = ""
    return f"{os.uname().nodename}/{boot}/{namespace}"


def _slurm_run() -> tuple[str | None, int]:
    """Job id, and how often SLURM had queued the job again before this run of it."""
    return os.environ.get("SLURM_JOB_ID"), int(os.environ.get("SLURM_RESTART_COUNT", "0"))


def _process_start(pid: int) -> str | None:
    """Start time of a process, to tell it from a later one with the same id; None when there is none."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    except (FileNotFoundError, ProcessLookupError):
        if Path("/proc/self/stat").exists():
            return None
        try:  # no /proc: the id alone must do
            os.kill(pid, 0)
        except ProcessLookupError:
            return None
        return ""
    return None if stat[0] == "Z" else stat[19]


class Lease:
    """`with Lease(folder):` waits until nobody alive holds the folder, then holds it and beats.

    waiting: called about once a second while another process holds it, with a text naming the holder; it may
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
        watched: tuple[int, Any] | None = None
        since = time.monotonic()
        while True:
            number, holder = self._current()
            if holder is None or holder.get("released") or self._dead(holder):
                if self._create(number + 1):
                    break
                continue
            sign = (number, holder.get("beat"))
            if sign != watched:
                watched, since = sign, time.monotonic()
            elif time.monotonic() - since > STALE_SECONDS:
                if self._create(number + 1):
                    break
                continue
            if self.waiting(f"process {holder.get('pid')} on {str(holder.get('machine')).partition('/')[0]}"):
                return self
            time.sleep(0.5)
        self.held = True
        self._thread = threading.Thread(target=self._beat_forever, daemon=True)
        self._thread.start()
        return self

    def __exit__(self, *exc: object) -> None:
        if self.held:
            self._stop.set()
            self._thread.join()
            with contextlib.suppress(OSError):  # finished and cleared by somebody else, or a full disk: we go stale
                if self._path(self.number).exists():
                    self._write(released=True)
            self.held = False

    def check(self) -> None:
        """Raises LeaseLost when the stage is no longer ours. Cheap unless this process was stopped for long."""
        if time.monotonic() - self._last_beat > STALE_SECONDS / 2 and not self._still_ours():
            self._lost = True
        if self._lost:
            raise LeaseLost(f"{self.folder}: another process took this stage over")

    def _path(self, number: int) -> Path:
        return self.folder / f"lease-{number:06d}"

    def _current(self) -> tuple[int, dict[str, Any] | None]:
        """Highest number and its holder; an empty or torn file reads as a holder without signs of life."""
        while number := self._highest():
            try:
                return number, json.loads(self._path(number).read_text())
            except FileNotFoundError:
                continue  # a taker of the next number has just removed it
            except (json.JSONDecodeError, OSError):  # torn, or replaced under a network file system's eyes
                return number, {"beat": "unreadable"}
        return 0, None

    def _highest(self) -> int:
        return max((int(p.name[6:]) for p in self.folder.glob("lease-??????")), default=0)

    @staticmethod
    def _dead(holder: dict[str, Any]) -> bool:
        if holder.get("machine") == _machine():
            return _process_start(holder["pid"]) != holder.get("start")
        # SLURM queues a job again when its former run has ended, or its node is lost to the cluster.
        job, run = _slurm_run()
        return job is not None and holder.get("job") == job and holder.get("run", 0) < run

    def _create(self, number: int) -> bool:
        self.folder.mkdir(parents=True, exist_ok=True)
        # Written whole beside it, then linked: link is exclusive, on NFS too, and the file is never seen empty.
        self.number, self._lost, self._beats = number, False, 0
        draft = self.folder / f".draft-{self.token}"
        try:
            draft.write_text(self._text())
            os.link(draft, self._path(number))
        except (FileExistsError, FileNotFoundError):  # somebody was first, or finished and cleared the folder
            return False
        finally:
            draft.unlink(missing_ok=True)
        if self._highest() > number:
            # Others took and left this number while we were on our way to it.
            self._path(number).unlink(missing_ok=True)
            return False
        self._last_beat = time.monotonic()
        for old in self.folder.glob("lease-??????"):
            if int(old.name[6:]) < number:
                old.unlink(missing_ok=True)
        return True

    def _text(self, **more: object) -> str:
        pid, (job, run) = os.getpid(), _slurm_run()
        return json.dumps(
            {
                "pid": pid,
                "start": _process_start(pid),
                "machine": _machine(),
                "job": job,
                "run": run,
                "token": self.token,
                "beat": self._beats,
                **more,
            }
        )

    def _write(self, **more: object) -> None:
        draft = self.folder / f".draft-{self.token}"
        draft.write_text(self._text(**more))
        os.replace(draft, self._path(self.number))

    def _still_ours(self) -> bool:
        number, holder = self._current()
        return number == self.number and holder is not None and holder.get("token") == self.token

    def _beat_forever(self) -> None:
        while not self._stop.wait(HEARTBEAT_SECONDS):
            try:
                if not self._still_ours():
                    self._lost = True
                    return
                self._beats += 1
                self._write()
                self._last_beat = time.monotonic()
            except OSError:
                continue  # a full disk or an unreachable server: the next beat may succeed, or we go stale
