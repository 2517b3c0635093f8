"""A warm worker process: torch is imported once, then stages are computed as they come through a pipe."""

from __future__ import annotations

import contextlib
import logging
import multiprocessing
import os
import signal
import threading
import time
from dataclasses import dataclass
from multiprocessing.connection import Connection
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.planning.identity import VERSIONS

if TYPE_CHECKING:
    from src.planning.stage import Stage


@dataclass(frozen=True)
class Place:
    """What a worker may use of the machine."""

    number: int
    share: int  # of how many workers that share the CPU cores
    gpu: str | None  # its CUDA_VISIBLE_DEVICES; None leaves it as it is


class Worker:
    """One process and the stage it is computing, seen from the launcher."""

    def __init__(self, place: Place, output_dir: Path, log_file: Path) -> None:
        # Forked from one process that has imported everything: that takes seconds of a core each. Not where there are
        # GPUs: libraries may look for them when they are imported, and CUDA does not live through a fork.
        context = multiprocessing.get_context("forkserver" if place.gpu is None else "spawn")
        context.set_forkserver_preload([f"src.stages.{kind}" for kind in VERSIONS])
        self.place, self.output_dir, self.log_file = place, output_dir, log_file
        self.stage: Stage | None = None
        self.pipe, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(  # type: ignore[attr-defined] # of either context
            target=serve, args=(theirs, place, output_dir, log_file), daemon=False
        )
        self.process.start()
        theirs.close()

    def give(self, stage: Stage) -> None:
        self.stage = stage
        with contextlib.suppress(OSError):  # it has died; `answer` says so
            self.pipe.send(stage)

    def answer(self) -> str | None:
        """After its pipe or process became ready: None when the stage is done, else why not."""
        try:
            return self.pipe.recv() if self.pipe.poll() else self._death()
        except (EOFError, OSError):
            return self._death()

    def _death(self) -> str:
        self.process.join(5)
        code = self.process.exitcode
        name = signal.Signals(-code).name if code is not None and code < 0 else f"exit code {code}"
        return f"{DIED} ({name}; see {self.log_file})"

    def stop(self) -> None:
        """At once; what it was computing resumes from its last checkpoint."""
        if self.process.is_alive():
            self.process.terminate()
        self.process.join(10)
        if self.process.is_alive():
            self.process.kill()
        self.pipe.close()


DIED = "its worker process died"


def serve(pipe: Connection, place: Place, output_dir: Path, log_file: Path) -> None:
    """The worker's life: until the pipe closes or the launcher is gone."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C reaches the whole group; the launcher decides
    signal.signal(signal.SIGTERM, _leave)
    threading.Thread(target=_die_with, args=(os.getppid(),), daemon=True).start()
    if place.gpu is not None:
        os.environ["CUDA_VISIBLE_DEVICES"] = place.gpu
    logging.basicConfig(
        filename=log_file, level=logging.INFO, format="%(asctime)s %(levelname)s %(name)s %(message)s", force=True
    )
    logging.captureWarnings(True)
    log = logging.getLogger(__name__)

    from src.errors import describe_failure
    from src.model.loading import set_cpu_threads
    from src.stages.runner import compute_or_wait
    from src.store.store import Store

    store = Store(output_dir)
    while True:
        try:
            stage: Stage = pipe.recv()
        except EOFError:
            return
        try:
            set_cpu_threads(stage.point.engine.cpu_threads, place.share)
            compute_or_wait(stage, store)
            outcome = None
        except Exception as error:
            log.exception("%s failed", stage.label)
            outcome = describe_failure(error)
        pipe.send(outcome)


def _leave(signum: int, frame: Any) -> None:
    """Through every `finally`: servers are stopped, answers under way kept."""
    raise SystemExit(128 + signum)


def _die_with(parent: int) -> None:
    """A launcher that was killed sends nothing (what its workers are forked from ends with it): without it a worker
    would compute on unseen."""
    while os.getppid() == parent:
        time.sleep(1)
    os._exit(1)
