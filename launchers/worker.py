"""A warm worker process: imports torch once, then computes the stages that it receives through a pipe."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import queue
import signal
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, Literal, NamedTuple

from src import preemption
from src.hardware import cores_of_process
from src.planning.identity import VERSIONS
from src.planning.stage import Stage

# What SLURM and terminals send to the whole group of processes. A worker that is still importing would die of it.
_GROUP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR2)


@dataclass(frozen=True)
class WorkerSlot:
    """The resources of this machine that one worker may use."""

    num_processes: int  # that share the CPU cores
    gpus: str | None  # CUDA_VISIBLE_DEVICES of the worker; None leaves the variable as it is
    output_dir: Path
    rank: int = 0  # among the processes that compute a stage together
    size: int = 1
    port: int = 0  # of this machine, where these processes meet
    in_job: bool = False  # in a SLURM job, whose first process handles its signals
    end: tuple[float, str] | None = None  # when the job ends, by time.monotonic(), and the reason to stop before it


class Work(NamedTuple):
    """A stage to be computed."""

    stage: Stage
    log_file: Path


class Stop(NamedTuple):
    """The stage that is being computed is to save a checkpoint and end."""

    reason: str


class Outcome(NamedTuple):
    """How a stage ended in a process: done, failed (why), stopped on request (why), or the process died (of what)."""

    state: Literal["done", "failed", "stopped", "died"]
    text: str = ""


class Worker:
    """A worker process and its outcome of the stage that it was given last, seen from the launcher."""

    def __init__(self, slot: WorkerSlot) -> None:
        # A fork server imports everything once, which takes seconds of a core per worker otherwise. Not with GPUs:
        # libraries may query them on import, and a CUDA context does not survive a fork.
        context = multiprocessing.get_context("forkserver" if slot.gpus is None else "spawn")
        context.set_forkserver_preload([f"src.stages.{kind}" for kind in VERSIONS])
        if slot.gpus is None:
            with _without_group_signals():
                forkserver.ensure_running()
        self.slot = slot
        self.outcome: Outcome | None = None
        self._log_file: Path | None = None
        self.pipe, worker_end = context.Pipe()
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined] # both contexts have it
            target=worker_main, args=(worker_end, slot), daemon=False
        )
        # Not for the fork server: it answers after its imports, and Ctrl-C would wait for it.
        with contextlib.nullcontext() if slot.gpus is None else _without_group_signals():
            self.process.start()
        worker_end.close()

    @property
    def handles(self) -> list[Any]:
        """What becomes ready when the stage has ended, or the process."""
        return [self.pipe, self.process.sentinel]

    def send(self, message: Work | Stop) -> None:
        if isinstance(message, Work):
            self.outcome, self._log_file = None, message.log_file
        with contextlib.suppress(OSError):  # the process has died; `receive` reports it
            self.pipe.send(message)

    def receive(self) -> None:
        """Set the outcome. Call when one of the handles became ready."""
        try:
            self.outcome = self.pipe.recv() if self.pipe.poll() else self._cause_of_death()
        except (EOFError, OSError):
            self.outcome = self._cause_of_death()

    def _cause_of_death(self) -> Outcome:
        self.process.join(5)
        code = self.process.exitcode
        cause = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return Outcome("died", f"worker process died ({cause}); log: {self._log_file}")

    def end(self) -> None:
        """Ask the process to end; the stage it computes resumes from the last checkpoint when it is run again."""
        self.pipe.close()
        if self.process.is_alive() and not self.slot.in_job:
            self.process.terminate()

    def join(self, timeout: float) -> None:
        """Wait until the process has ended, and kill it after so many seconds."""
        self.process.join(timeout)
        if self.process.is_alive():
            self.process.kill()
            self.process.join()


@contextlib.contextmanager
def _without_group_signals() -> Iterator[None]:
    """Start processes in which signals to the whole group are blocked, which would end them during their imports."""
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
    try:
        resource_tracker.ensure_running()  # each kind of process needs it, and starting it lifts the block in part
        signal.pthread_sigmask(signal.SIG_BLOCK, _GROUP_SIGNALS)
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def worker_main(pipe: Connection, slot: WorkerSlot) -> None:
    """Compute stages until the pipe is closed or the launcher has died."""
    _handle_signals(slot.in_job)
    threading.Thread(target=_exit_with_launcher, daemon=True).start()
    inbox: queue.SimpleQueue[Work | None] = queue.SimpleQueue()
    threading.Thread(target=_read_messages, args=(pipe, inbox), daemon=True).start()
    _set_environment(slot)
    logging.captureWarnings(True)
    logging.raiseExceptions = False  # a full disk fails the stage in one line; its log cannot be written either
    message = "%(asctime)s %(levelname)s %(name)s %(message)s"
    log, log_file = logging.getLogger(__name__), None

    # The launcher itself imports no torch.
    from src.distributed import init_distributed
    from src.errors import describe_failure
    from src.model.loading import set_cpu_threads
    from src.stages.runner import compute_or_wait
    from src.store.store import Store

    store = Store(slot.output_dir)
    while (work := inbox.get()) is not None:
        stage = work.stage
        try:
            if work.log_file != log_file:
                log_file = work.log_file
                logging.basicConfig(filename=log_file, level=logging.INFO, format=message, force=True)
            if slot.size > 1:
                init_distributed(stage.point.engine.strategy)  # once; later calls return the same
            set_cpu_threads(stage.point.engine.cpu_threads, slot.num_processes)
            compute_or_wait(stage, store)
            outcome = Outcome("done")
        except preemption.Interrupted as interruption:
            log.warning("%s", interruption)
            outcome = Outcome("stopped", interruption.reason)
        except Exception as exception:
            log.exception("%s failed", stage.label)
            prefix = f"process {slot.rank}: " if slot.rank else ""
            outcome = Outcome("failed", prefix + describe_failure(exception))
        with contextlib.suppress(OSError):  # the launcher wants to know nothing any more
            pipe.send(outcome)
    # The signal of `Worker.end` would interrupt what Python does at its end, such as to release semaphores.
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def _handle_signals(in_job: bool) -> None:
    """Leave Ctrl-C, and in a job the signals that announce its end, to the launcher."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, _leave_to_launcher if in_job else _exit_on_signal)
    if in_job:
        signal.signal(signal.SIGUSR2, _leave_to_launcher)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, _GROUP_SIGNALS)


def _set_environment(slot: WorkerSlot) -> None:
    """Set the GPUs of this process, its rank as torchrun would, and when its job ends."""
    if slot.gpus is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = slot.gpus
    if slot.size > 1:
        numbers = {"RANK": slot.rank, "WORLD_SIZE": slot.size, "LOCAL_RANK": slot.rank, "LOCAL_WORLD_SIZE": slot.size}
        # accelerate sets the number of threads by itself unless this says it.
        numbers |= {"MASTER_PORT": slot.port, "OMP_NUM_THREADS": cores_of_process(slot.num_processes)}
        os.environ.update({name: str(number) for name, number in numbers.items()}, MASTER_ADDR="localhost")
    if slot.end is not None:
        preemption.set_time_limit(max(0.0, slot.end[0] - time.monotonic()), slot.end[1])


def _read_messages(pipe: Connection, inbox: queue.SimpleQueue[Work | None]) -> None:
    """Hand work to the main thread; pass requests to stop on to the stage that it is computing."""
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            # The main thread ends when its stage has; where that has no end in sight, it stops at a checkpoint.
            preemption.request("the launcher has ended")
            inbox.put(None)
            return
        if isinstance(message, Stop):
            preemption.request(message.reason)
        else:
            inbox.put(message)


def _leave_to_launcher(signum: int, frame: Any) -> None:
    """Do nothing; a handler, as a model server that is started here would inherit an ignored signal."""


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
