"""The default launcher: computes the stages of a plan on this machine, in warm worker processes."""

from __future__ import annotations

import logging
import signal
from multiprocessing.connection import wait

from launchers.job_order import Schedule
from launchers.progress_table import LiveTable
from launchers.protocol import PlanLauncher
from launchers.worker import WORKER_DIED, Worker, WorkerSlot
from src.errors import ConfigError, PointFailure
from src.hardware import cores, visible_gpus
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.preflight import check_cpu_threads, check_programs
from src.store.retention import release_models
from src.store.sweep_folder import SweepFolder

log = logging.getLogger(__name__)

MAX_WORKERS = 1024  # processes, each of which holds a model


class LocalLauncher(PlanLauncher):
    """Hydra's plugin for conf/hydra/launcher/local.yaml."""

    runs_in_process = True

    def __init__(self, workers: int | None = None) -> None:
        if workers is not None and (type(workers) is not int or not 1 <= workers <= MAX_WORKERS):
            raise ConfigError(f"hydra.launcher.workers={workers}: must be a number from 1 to {MAX_WORKERS}, or null")
        self.workers = workers

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a plan that cannot run here, before anything is written."""
        if plan.needed:
            check_programs(plan.points)
            check_cpu_threads(plan.points)

    def num_processes(self, stage: Stage) -> int:
        """Return 1: each worker computes stages of its own."""
        return 1

    def max_running(self, plan: Plan) -> int:
        """Return the number of workers."""
        return min(self.workers or len(visible_gpus()) or cores(), super().max_running(plan))

    def on_gpus(self, number: int) -> str:
        """Return the overrides for a number of GPUs, which only jobs have together."""
        return f"hydra/launcher=slurm {super().on_gpus(number)}"

    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure]:
        """Compute what the plan needs and return the points without a result: identity of the result -> why.

        Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the workers have been stopped.
        """
        if not plan.needed:
            return {}
        schedule, store = Schedule(plan), folder.store
        folder.logs.mkdir(parents=True, exist_ok=True)
        gpus = visible_gpus()
        num_workers = self.max_running(plan)
        previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        workers: list[Worker] = []
        try:
            with LiveTable(folder.name, schedule, store, workers) as table:
                for i in range(num_workers):
                    gpu, log_file = gpus[i % len(gpus)] if gpus else None, folder.logs / f"worker-{i}.log"
                    workers.append(Worker(WorkerSlot(num_workers, gpu, store.output_dir, log_file)))
                while not schedule.finished():
                    for worker in workers:
                        if worker.stage is None and (stage := schedule.next()) is not None:
                            worker.submit(stage)
                    finished = _collect_finished(workers, schedule)
                    for stage, error in finished:
                        if stage.kind == "evaluate" and error is None:
                            release_models(folder, {stage.identity})
                    table.update(finished)
        finally:
            for worker in workers:
                worker.stop()
            signal.signal(signal.SIGTERM, previous_handler)
        failures = schedule.failures
        return {result: PointFailure("failed", failures[result]) for result in plan.results if result in failures}


def _collect_finished(workers: list[Worker], schedule: Schedule) -> list[tuple[Stage, str | None]]:
    """Wait for results and return the stages that are done (None) or failed (why), after half a second perhaps none.

    A worker that died is replaced. Its stage is retried: a kill is no fault of the stage, which resumes from its
    checkpoint in a fresh process.
    """
    busy = [worker for worker in workers if worker.stage is not None]
    ready = wait([handle for worker in busy for handle in (worker.pipe, worker.process.sentinel)], timeout=0.5)
    finished: list[tuple[Stage, str | None]] = []
    for number, worker in enumerate(workers):
        stage = worker.stage
        if stage is None or not (worker.pipe in ready or worker.process.sentinel in ready):
            continue
        error, worker.stage = worker.result(), None
        if error is None:
            schedule.done(stage)
        elif error.startswith(WORKER_DIED) and schedule.requeue(stage):
            log.warning("%s: %s; retrying", stage.label, error)
        else:
            schedule.fail(stage, error)
        if stage.identity not in schedule.waiting:
            finished.append((stage, error))
        if not worker.process.is_alive():
            workers[number] = Worker(worker.slot)
    return finished
