"""The default launcher: computes the stages of a plan on this machine, in warm worker processes."""

from __future__ import annotations

import signal

from launchers.job_order import Schedule
from launchers.processes import check_num_processes
from launchers.progress_table import LiveTable
from launchers.protocol import PlanLauncher
from launchers.worker import WorkerSlot
from launchers.worker_group import GroupSlot
from launchers.worker_pool import WorkerPool, group_slots
from src.errors import ConfigError, PointFailure
from src.hardware import visible_gpus
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.preflight import check_cpu_threads, check_programs
from src.store.retention import release_models
from src.store.store import Store
from src.store.sweep_folder import SweepFolder

MAX_WORKERS = 1024  # processes, each of which holds a model


class LocalLauncher(PlanLauncher):
    """Hydra's plugin for conf/hydra/launcher/local.yaml."""

    runs_in_process = True

    def __init__(self, workers: int | None = None, gpus_per_point: int = 1) -> None:
        for name, value in (("workers", workers), ("gpus_per_point", gpus_per_point)):
            if (name, value) != ("workers", None) and (type(value) is not int or not 1 <= value <= MAX_WORKERS):
                null = ", or null" if name == "workers" else ""
                raise ConfigError(f"hydra.launcher.{name}={value}: must be a number from 1 to {MAX_WORKERS}{null}")
        if (workers or 1) * gpus_per_point > MAX_WORKERS:
            raise ConfigError(
                f"hydra.launcher.workers={workers}: {workers} x gpus_per_point={gpus_per_point} is more than"
                f" {MAX_WORKERS} processes"
            )
        self.workers, self.gpus_per_point = workers, gpus_per_point

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a plan that cannot run here, before anything is written."""
        if not plan.needed:
            return
        gpus = visible_gpus()
        if gpus and len(gpus) < self.gpus_per_point:
            raise ConfigError(
                f"hydra.launcher.gpus_per_point={self.gpus_per_point}: this machine has {len(gpus)} GPUs; set at most"
                " so many"
            )
        key = "hydra.launcher.gpus_per_point"
        for stage in (stage for identity, stage in plan.stages.items() if identity in plan.needed):
            # Also where rank 0 computes it alone: the processes of a point have joined each other before.
            check_num_processes(stage.point, stage.kind, self.gpus_per_point, key, f"{key}=1")
        check_programs(plan.points)
        check_cpu_threads(plan.points)

    def num_processes(self, stage: Stage) -> int:
        """Return the processes of a point, or 1 for what one of them computes by itself."""
        return self.gpus_per_point if stage.is_shared else 1

    def max_running(self, plan: Plan) -> int:
        """Return the number of groups of workers."""
        return len(self._slots(plan))

    def on_gpus(self, number: int) -> str:
        """Return the overrides for a number of GPUs: of this machine, or of jobs where it has fewer."""
        if len(visible_gpus()) >= number:
            return f"hydra.launcher.gpus_per_point={number}"
        return f"hydra/launcher=slurm {super().on_gpus(number)}"

    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure]:
        """Compute what the plan needs and return the points without a result: identity of the result -> why.

        Raises KeyboardInterrupt on Ctrl-C or SIGTERM, after the workers have been stopped.
        """
        if not plan.needed:
            return {}
        schedule, store = Schedule(plan), folder.store
        folder.logs.mkdir(parents=True, exist_ok=True)
        release_models(folder, plan.done)  # a run that was killed may have left some
        pool = WorkerPool(schedule, self._slots(plan), lambda number, stage: folder.logs / f"worker-{number}.log")
        table = LiveTable(folder.name, schedule, store, pool.groups)

        def finished(stages: list[tuple[Stage, str | None]]) -> None:
            if results := {stage.identity for stage, error in stages if stage.kind == "evaluate" and error is None}:
                release_models(folder, results)
            table.update(stages)

        previous_handler = signal.signal(signal.SIGTERM, signal.default_int_handler)
        try:
            with pool, table:
                pool.run(finished=finished)
        finally:
            signal.signal(signal.SIGTERM, previous_handler)
        failures = schedule.failures
        return {result: PointFailure("failed", failures[result]) for result in plan.results if result in failures}

    def _slots(self, plan: Plan) -> list[GroupSlot]:
        def worker(num_processes: int, gpus: str | None) -> WorkerSlot:
            return WorkerSlot(num_processes, gpus, Store(plan.points[0].output_dir).output_dir)

        return group_slots(self.workers, self.gpus_per_point, visible_gpus(), super().max_running(plan), worker)
