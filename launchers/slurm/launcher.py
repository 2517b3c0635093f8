"""The SLURM launcher: submits what a plan needs as jobs and returns; the last job finalizes the sweep."""

from __future__ import annotations

import functools
import sys
from typing import Any

from launchers.processes import check_num_processes
from launchers.protocol import PlanLauncher
from launchers.slurm import cluster
from launchers.slurm.graph import MAX_FOLLOWING, job_arrays, job_kind
from launchers.slurm.job_records import submissions
from launchers.slurm.options import AUTO, OWN_JOB, complete_options
from launchers.slurm.sampling import choose_sampling
from launchers.slurm.status import failed_points, read_status
from launchers.slurm.status_table import announce, watch
from launchers.slurm.submit import submit
from launchers.slurm.time_limit import signal_delay
from src.errors import ConfigError, PointFailure
from src.estimates.forecast import Forecast
from src.planning.plan import Plan
from src.planning.save_time import SaveTimes
from src.planning.stage import Stage
from src.store.lease import Lease
from src.store.store import SHARED_ROLES, Store
from src.store.sweep_folder import SweepFolder


class SlurmLauncher(PlanLauncher):
    """Hydra's plugin for conf/hydra/launcher/slurm.yaml."""

    runs_in_process = False

    def __init__(self, **options: Any) -> None:
        """Check the options, those of SlurmOptions."""
        self.options = complete_options(options)
        self._is_undecided = self.options.sampling == AUTO  # until `settle`

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a plan whose jobs cannot run, before anything is written."""
        if not plan.needed:
            return
        output_dir = Store(plan.points[0].output_dir).output_dir
        if "%" in str(output_dir):
            raise ConfigError(
                f"output_dir={output_dir}: must have no % with hydra/launcher=slurm, which replaces it in names of logs"
            )
        kinds = {self._kind(plan.stages[identity]) for identity in plan.needed} | {"align"}
        for kind in sorted(kinds):
            num_processes = self.options.kinds[kind].num_processes
            where = self._decides_num_processes(kind)
            for point in plan.points:
                check_num_processes(point, kind, num_processes, where, f"{where}=1")
        self._check_parallelism(plan)
        times = SaveTimes(Store(output_dir))
        for kind in sorted(kinds):
            stages = [plan.stages[identity] for identity in plan.needed if self._kind(plan.stages[identity]) == kind]
            signal_delay(kind, stages, self.options, times)
        for kind in sorted(kinds | {"aggregate"}):
            cluster.check_request(kind, self.options.kinds[kind].sbatch())

    def _check_parallelism(self, plan: Plan) -> None:
        limit = self.options.array_parallelism
        if limit is None or self.options.sampling != OWN_JOB:
            return
        arrays = list(job_arrays(plan, (), (), sys.maxsize, own_sampling=True))
        if (number := sum(array.kind == "sample" for array in arrays)) > limit:
            raise ConfigError(
                f"hydra.launcher.array_parallelism={limit}: below the {number} arrays of at most {MAX_FOLLOWING} points"
                f" that sampling=own_job makes, of which one point each runs; set at least {number}, or"
                " sampling=same_job"
            )

    def _decides_num_processes(self, kind: str) -> str:
        """Return the key that decides how many processes compute a stage of such a job together."""
        if kind == "align" and self.options.points_per_job > 1:
            return "hydra.launcher.gpus_per_point"
        return f"hydra.launcher.kinds.{kind}.gpus_per_node"

    def num_processes(self, stage: Stage) -> int:
        """Return the processes of the stage's job, or 1 for what one of them computes by itself."""
        return self.options.kinds[self._kind(stage)].num_processes if stage.is_shared else 1

    def _kind(self, stage: Stage) -> str:
        return job_kind(stage, self.options.sampling == OWN_JOB)

    def starts_job(self, stage: Stage) -> bool:
        """Return whether a job begins with the stage."""
        return stage.role in (*SHARED_ROLES, "align") or (stage.kind == "generate" and self.options.sampling == OWN_JOB)

    def settle(self, plan: Plan, forecast: Forecast) -> str:
        """Decide where points are sampled when `sampling=auto`."""
        if not self._is_undecided or not plan.needed:
            return ""
        self.options.sampling, reason = choose_sampling(self.options, plan, forecast, self._max_aligning(plan))
        return f"sampling: {self.options.sampling} (hydra.launcher.sampling=auto): {reason}"

    def max_running(self, plan: Plan) -> int:
        """Return how many points all jobs compute at once; array_parallelism bounds those of one submission.

        With sampling in jobs of their own all points may wait for it, each with its model.
        """
        return super().max_running(plan) if self.options.sampling == OWN_JOB else self._max_aligning(plan)

    def _max_aligning(self, plan: Plan) -> int:
        number = super().max_running(plan)
        arrays = job_arrays(plan, (), (), sys.maxsize, self.options.points_per_job)
        num_jobs = sum(len(array.jobs) for array in arrays if array.kind == "align")
        number = min(number, max(1, num_jobs * self.options.kinds["align"].points_at_once))
        return min(self.options.array_parallelism or number, number)

    def on_gpus(self, number: int) -> str:
        """Return the overrides for a number of GPUs for each point."""
        several = [name for name in ("points_per_job", "gpus_per_point") if getattr(self.options, name) > 1]
        return " ".join([*(f"hydra.launcher.{name}=1" for name in several), super().on_gpus(number)])

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
