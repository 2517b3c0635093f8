"""The SLURM launcher: submits what a plan needs as jobs and returns; the last job finalizes the sweep."""

from __future__ import annotations

import functools
from typing import Any

from launchers.protocol import PlanLauncher
from launchers.slurm import cluster
from launchers.slurm.graph import job_kind
from launchers.slurm.job_records import submissions
from launchers.slurm.options import complete_options
from launchers.slurm.status import failed_points, read_status
from launchers.slurm.status_table import announce, watch
from launchers.slurm.submit import submit
from launchers.slurm.time_limit import signal_delay
from src.config.schema import Point
from src.errors import ConfigError, PointFailure
from src.planning.plan import Plan
from src.planning.save_time import SaveTimes
from src.planning.stage import Stage
from src.store.lease import Lease
from src.store.store import Store
from src.store.sweep_folder import SweepFolder


class SlurmLauncher(PlanLauncher):
    """Hydra's plugin for conf/hydra/launcher/slurm.yaml."""

    runs_in_process = False

    def __init__(self, **options: Any) -> None:
        """Check the options, those of SlurmOptions."""
        self.options = complete_options(options)

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a plan whose jobs cannot run, before anything is written."""
        if not plan.needed:
            return
        output_dir = Store(plan.points[0].output_dir).output_dir
        if "%" in str(output_dir):
            raise ConfigError(
                f"output_dir={output_dir}: must have no % with hydra/launcher=slurm, which replaces it in names of logs"
            )
        kinds = {job_kind(plan.stages[identity]) for identity in plan.needed} | {"align"}
        for kind in sorted(kinds):
            for point in plan.points:
                self._check_num_processes(kind, point)
        times = SaveTimes(Store(output_dir))
        for kind in sorted(kinds):
            stages = [plan.stages[identity] for identity in plan.needed if job_kind(plan.stages[identity]) == kind]
            signal_delay(kind, stages, self.options, times)
        for kind in sorted(kinds | {"aggregate"}):
            cluster.check_request(kind, self.options.kinds[kind].sbatch())

    def _check_num_processes(self, kind: str, point: Point) -> None:
        """Raise ConfigError unless the point's engine and batch size suit the number of processes of such a job."""
        num_processes = self.options.kinds[kind].tasks
        if kind in ("sft", "align"):
            batch_size = getattr(point.trainer, kind).batch_size
            if batch_size < num_processes:
                raise ConfigError(
                    f"trainer.{kind}.batch_size={batch_size}: below the {num_processes} processes of a {kind} job, each"
                    " of which needs an example per step; lower hydra.launcher.gpus_per_node or nodes"
                )
        if num_processes > 1 and point.engine.strategy == "none":
            raise ConfigError(
                f"hydra.launcher: {kind} jobs have {num_processes} GPUs, but engine={point.engine.name} uses one:"
                " choose engine=fsdp, or give the job gpus_per_node=1"
            )

    def num_processes(self, stage: Stage) -> int:
        """Return the tasks of the stage's job, or 1 for what one of them computes by itself."""
        return self.options.kinds[job_kind(stage)].tasks if stage.is_shared else 1

    def max_running(self, plan: Plan) -> int:
        """Return the points to compute, or array_parallelism, which bounds those of one submission."""
        number = super().max_running(plan)
        return min(self.options.array_parallelism or number, number)

    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure] | None:
        """Submit what is neither done nor queued or running; return None while jobs run.

        Once all jobs have ended, return the points without a result: identity of the result -> why. Raises ConfigError
        when SLURM rejects a job, SlurmUnavailable when it does not answer.
        """
        if not plan.needed and not submissions(folder):
            return {}
        try:
            with Lease(folder.store.sweeps / ".submitting", _report_holder):
                skipped: set[str] = set()
                if not self.options.retry_failed:
                    points = read_status(folder).points
                    skipped = {point.identity for point in points if point.state in ("failed", "cancelled")}
                submitted = submit(plan, folder, finalize, self.options, skipped)
        except (ConfigError, cluster.SlurmUnavailable):
            if plan.needed:
                raise
            return {}  # every point is done, so SLURM need not answer
        announce(plan, folder, submitted)
        if submitted.submissions or submitted.in_flight:
            if not self.options.wait:
                return None
            watch(folder)
        return failed_points(folder)


@functools.cache  # once per holder
def _report_holder(holder: str) -> bool:
    """Print which process the lease waits for; return False, which means to wait on."""
    print(f"another process is submitting to this store ({holder}); waiting", flush=True)
    return False
