"""A warm worker process: imports torch once, then computes the stages that it receives through a pipe."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

from src.planning.identity import VERSIONS
from src.planning.stage import Stage

WORKER_DIED = "worker process died"


@dataclass(frozen=True)
class WorkerSlot:
    """The resources of this machine that one worker may use, and where it writes."""

    num_workers: int  # that share the CPU cores
    gpu: str | None  # CUDA_VISIBLE_DEVICES of the worker; None leaves the variable as it is
    output_dir: Path
    log_file: Path


class Worker:
    """A worker process and the stage it is computing, seen from the launcher."""

    def __init__(self, slot: WorkerSlot) -> None:
        # A fork server imports everything once, which takes seconds of a core per worker otherwise. Not with GPUs:
        # libraries may query them on import, and a CUDA context does not survive a fork.
        context = multiprocessing.get_context("forkserver" if slot.gpu is None else "spawn")
        context.set_forkserver_preload([f"src.stages.{kind}" for kind in VERSIONS])
        if slot.gpu is None:
            with _without_interrupts():
                forkserver.ensure_running()
        self.slot = slot
        self.stage: Stage | None = None
        self.pipe, worker_end = context.Pipe()
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined] # both contexts have it
            target=worker_main, args=(worker_end, slot), daemon=False
        )
        # Not for the fork server: it answers after its imports, and Ctrl-C would wait for it.
        with contextlib.nullcontext() if slot.gpu is None else _without_interrupts():
            self.process.start()
        worker_end.close()

    def submit(self, stage: Stage) -> None:
        self.stage = stage
        with contextlib.suppress(OSError):  # the process has died; `result` reports it
            self.pipe.send(stage)

    def result(self) -> str | None:
        """Return None when the stage is done, else why it failed. Call when the pipe or the process became ready."""
        try:
            return self.pipe.recv() if self.pipe.poll() else self._cause_of_death()
        except (EOFError, OSError):
            return self._cause_of_death()

    def _cause_of_death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"{WORKER_DIED} ({cause}); log: {self.slot.log_file}"

    def stop(self) -> None:
        """Terminate the process; its stage resumes from the last checkpoint when it is run again."""
        if self.process.is_alive():
            self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.pipe.close()


@contextlib.contextmanager
def _without_interrupts() -> Iterator[None]:
    """Start processes in which Ctrl-C is blocked: it reaches the whole group, and would interrupt their imports."""
    resource_tracker.ensure_running()  # each kind of process needs it, and starting it lifts the block
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_main(pipe: Connection, slot: WorkerSlot) -> None:
    """Compute stages until the pipe is closed or the launcher has died."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole process group; the launcher handles it
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    signal.signal(signal.SIGTERM, _exit_on_signal)
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    if slot.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpu
    message = "%(asctime)s %(levelname)s %(name)s %(message)s"
    logging.basicConfig(filename=slot.log_file, level=logging.INFO, format=message, force=True)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk fails the stage in one line; its log cannot be written either
    log = logging.getLogger(__name__)

    # The launcher itself imports no torch.
    from src.errors import describe_failure
    from src.model.loading import set_cpu_threads
    from src.stages.runner import compute_or_wait
    from src.store.store import Store

    store = Store(slot.output_dir)
    while True:
        try:
            stage: Stage = pipe.recv()
        except EOFError:
            return
        try:
            set_cpu_threads(stage.point.engine.cpu_threads, slot.num_workers)
            compute_or_wait(stage, store)
            error = None
        except Exception as exception:
            log.exception("%s failed", stage.label)
            error = describe_failure(exception)
        pipe.send(error)


def _exit_on_signal(signum: int, frame: Any) -> None:
    """Exit through every `finally` block, which stop model servers and save partial results."""
    raise SystemExit(128 + signum)


def _exit_with_launcher() -> None:
    """Exit once the launcher is gone.

    A launcher killed with SIGKILL cannot stop its workers: they would compute on, and hold their leases.
    """
    launcher = multiprocessing.parent_process()  # also where the fork server is the parent in the operating system
    assert launcher is not None
    launcher.join()
    os._exit(1)
