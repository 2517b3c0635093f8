"""The SLURM launcher: submits what a plan needs as jobs and returns; the last job finalizes the sweep."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from launchers.protocol import PlanLauncher
from launchers.slurm import cluster
from launchers.slurm.graph import job_kind
from launchers.slurm.job_records import submissions
from launchers.slurm.options import UPLOAD, job_resources
from launchers.slurm.status import failed_points, read_status
from launchers.slurm.status_table import announce, watch
from launchers.slurm.submit import JobOptions, submit
from src.config.schema import Point
from src.errors import ConfigError, PointFailure
from src.planning.plan import Plan
from src.store.lease import Lease
from src.store.sweep_folder import SweepFolder


class SlurmLauncher(Launcher, PlanLauncher):
    """Hydra's plugin for conf/hydra/launcher/slurm.yaml."""

    runs_in_process = False

    def __init__(
        self,
        kinds: Any,
        array_parallelism: int | None,
        signal_delay_s: int,
        retry_failed: bool,
        upload: str,
        wait: bool,
        **common: Any,
    ) -> None:
        self.resources = job_resources(_to_container(common), _to_container(kinds))
        if array_parallelism is not None and array_parallelism < 1:
            raise ConfigError(f"hydra.launcher.array_parallelism={array_parallelism}: must be >= 1, or null")
        if not 1 <= signal_delay_s <= 65535:
            raise ConfigError(f"hydra.launcher.signal_delay_s={signal_delay_s}: must be between 1 and 65535 seconds")
        for kind, resources in self.resources.items():
            # SLURM sends the signal up to 60 s early.
            if kind != "aggregate" and resources.timeout_min * 60 <= signal_delay_s + 60:
                raise ConfigError(
                    f"hydra.launcher: timeout_min={resources.timeout_min} is too short for {kind} jobs: the stop signal"
                    f" (signal_delay_s={signal_delay_s}) would arrive at job start"
                )
        if upload not in UPLOAD:
            raise ConfigError(f"hydra.launcher.upload={upload}: must be one of {', '.join(UPLOAD)}")
        self.array_parallelism, self.signal_delay_s = array_parallelism, signal_delay_s
        self.retry_failed, self.upload, self.wait = retry_failed, upload, wait

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        pass  # a plan contains the resolved configs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise ConfigError("hydra/launcher=slurm runs plans, which hydra/sweeper=grid makes; choose that sweeper")

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a plan whose jobs cannot run, before anything is written."""
        if not plan.needed:
            return
        kinds = {job_kind(plan.stages[identity]) for identity in plan.needed} | {"align"}
        for kind in sorted(kinds):
            for point in plan.points:
                self._check_num_processes(kind, point)
        cluster.check_commands()
        for kind in sorted(kinds | {"aggregate"}):
            cluster.check_request(kind, self.resources[kind].sbatch())

    def _check_num_processes(self, kind: str, point: Point) -> None:
        """Raise ConfigError unless the point's engine and batch size suit the number of processes of such a job."""
        num_processes = self.resources[kind].tasks
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
                " choose engine=ddp, or give the job gpus_per_node=1"
            )

    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure] | None:
        """Submit what is neither done nor queued or running; return None while jobs run.

        Once all jobs have ended, return the points without a result: identity of the result -> why. Raises ConfigError
        when SLURM rejects a job, SlurmUnavailable when it does not answer.
        """
        if not plan.needed and not submissions(folder):
            return {}
        options = JobOptions(self.resources, self.array_parallelism, self.signal_delay_s, self.upload)
        try:
            with Lease(folder.store.sweeps / ".submitting", _report_holder()):
                skipped: set[str] = set()
                if not self.retry_failed:
                    points = read_status(folder).points
                    skipped = {point.identity for point in points if point.state in ("failed", "cancelled")}
                submitted = submit(plan, folder, finalize, options, skipped)
        except (ConfigError, cluster.SlurmUnavailable):
            if plan.needed:
                raise
            return {}  # every point is done, so SLURM need not answer
        announce(plan, folder, submitted)
        if submitted.submissions or submitted.in_flight:
            if not self.wait:
                return None
            watch(folder)
        return failed_points(folder)


def _report_holder() -> Callable[[str], bool]:
    """Return the callback of a lease that prints whom it waits for, once per holder, and does not give up."""
    printed: set[str] = set()

    def waiting(holder: str) -> bool:
        if holder not in printed:
            printed.add(holder)
            print(f"another process is submitting to this store ({holder}); waiting", flush=True)
        return False

    return waiting


def _to_container(node: Any) -> Any:
    """Convert OmegaConf's containers, at any depth of dicts, to plain ones."""
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node)
    return {key: _to_container(value) for key, value in node.items()} if isinstance(node, dict) else node
