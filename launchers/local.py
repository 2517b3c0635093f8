"""The default launcher: the stages of a plan on this machine, by warm worker processes."""

from __future__ import annotations

import logging
import signal
from collections.abc import Sequence
from multiprocessing.connection import wait
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig

from launchers.job_order import Schedule
from launchers.progress_table import LiveTable
from launchers.worker import DIED, Place, Worker
from src.errors import ConfigError, PointFailure
from src.hardware import cores, visible_gpus
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.preflight import check_programs
from src.store.retention import release_model
from src.store.sweep_folder import SweepFolder

log = logging.getLogger(__name__)


class LocalLauncher(Launcher):
    """Hydra discovers and builds it; what it runs is a plan, not a list of overrides."""

    runs_in_process = True  # points are computed while this process waits

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and workers < 1:
            raise ConfigError(f"hydra.launcher.workers={workers}: must be >= 1")
        self.workers = workers

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        pass  # a plan brings all there is to know

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise ConfigError("hydra/launcher=local runs plans, which hydra/sweeper=grid makes; choose that sweeper")

    def check(self, plan: Plan) -> None:
        """What can be wrong before anything is written down. Raises ConfigError."""
        if plan.needed:
            check_programs(plan.points)

    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure]:
        """Compute what the plan needs and return the points without a result: identity of the result -> why.

        Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the workers have been stopped.
        """
        schedule, store, logs = Schedule(plan), folder.store, folder.logs
        if not plan.needed:
            return {}
        logs.mkdir(parents=True, exist_ok=True)
        gpus = visible_gpus()
        count = min(self.workers or len(gpus) or cores(), schedule.width())
        places = [Place(i, count, gpus[i % len(gpus)] if gpus else None) for i in range(count)]
        before = signal.signal(signal.SIGTERM, _interrupt)
        workers: list[Worker] = []
        try:
            with LiveTable(folder.name, schedule, store, workers) as table:
                workers += [Worker(place, store.output_dir, logs / f"worker-{place.number}.log") for place in places]
                ended: list[tuple[Stage, str | None]] = []
                while not schedule.finished():
                    for worker in workers:
                        if worker.stage is None and (stage := schedule.next()) is not None:
                            worker.give(stage)
                    table.told(ended)
                    busy = [w for w in workers if w.stage is not None]
                    ready = wait([x for w in busy for x in (w.pipe, w.process.sentinel)], timeout=0.5)
                    for number, worker in enumerate(workers):
                        if worker.stage is not None and (worker.pipe in ready or worker.process.sentinel in ready):
                            news = self._settle(worker, schedule)
                            for stage, reason in news:
                                if (
                                    stage.kind == "evaluate"
                                    and reason is None
                                    and stage.point.keep_checkpoints == "none"
                                ):
                                    release_model(store, plan.stages_by_role, stage.upstream["align"].identity)
                            ended += news
                            if not worker.process.is_alive():
                                workers[number] = Worker(worker.place, store.output_dir, worker.log_file)
                    table.refresh()
                table.told(ended)
        finally:
            for worker in workers:
                worker.stop()
            signal.signal(signal.SIGTERM, before)
        return {result: PointFailure("failed", why) for result, why in schedule.failed_points().items()}

    @staticmethod
    def _settle(worker: Worker, schedule: Schedule) -> list[tuple[Stage, str | None]]:
        """Take the worker's answer; what there is to tell of it."""
        stage, reason = worker.stage, worker.answer()
        assert stage is not None
        worker.stage = None
        if reason is None:
            schedule.done(stage)
        elif reason.startswith(DIED) and schedule.once_more(stage):
            # A kill says nothing about the stage: it resumes from its checkpoint in a fresh process.
            log.warning("%s: %s; trying once more", stage.label, reason)
            return []
        else:
            schedule.fail(stage, reason)
        return [(stage, reason)]


def _interrupt(signum: int, frame: Any) -> None:
    raise KeyboardInterrupt
