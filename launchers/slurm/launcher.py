"""The SLURM launcher: submits what a plan needs as jobs and returns; the jobs do the rest, its conclusion included."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher
from hydra.types import HydraContext, TaskFunction
from omegaconf import DictConfig, OmegaConf

from launchers.slurm.graph import kind_of
from launchers.slurm.options import UPLOAD, resources_of
from src.config.schema import Point
from src.errors import ConfigError, PointFailure
from src.planning.plan import Plan
from src.store.lease import Lease
from src.store.sweep_folder import SweepFolder

if TYPE_CHECKING:
    from launchers.slurm.submit import Submitted


class SlurmLauncher(Launcher):
    """Hydra discovers and builds it from conf/hydra/launcher/slurm.yaml."""

    runs_in_process = False  # points are computed by jobs, which do what belongs to that

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
        self.resources = resources_of(_plain(common), _plain(kinds))
        if array_parallelism is not None and array_parallelism < 1:
            raise ConfigError(f"hydra.launcher.array_parallelism={array_parallelism}: must be >= 1, or null")
        if not 1 <= signal_delay_s <= 65535:
            raise ConfigError(f"hydra.launcher.signal_delay_s={signal_delay_s}: must be between 1 and 65535 seconds")
        for kind, of_kind in self.resources.items():
            if kind != "aggregate" and of_kind.timeout_min * 60 <= signal_delay_s + 60:
                raise ConfigError(
                    f"hydra.launcher: {kind} jobs of timeout_min={of_kind.timeout_min} would be told to stop as they"
                    f" start (signal_delay_s={signal_delay_s} before the end, and up to 60 s earlier): raise the one or"
                    " lower the other"
                )
        if upload not in UPLOAD:
            raise ConfigError(f"hydra.launcher.upload={upload}: must be one of {', '.join(UPLOAD)}")
        self.array_parallelism, self.signal_delay_s = array_parallelism, signal_delay_s
        self.retry_failed, self.upload, self.wait = retry_failed, upload, wait

    def setup(self, *, hydra_context: HydraContext, task_function: TaskFunction, config: DictConfig) -> None:
        pass  # a plan brings all there is to know

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise ConfigError("hydra/launcher=slurm runs plans, which hydra/sweeper=grid makes; choose that sweeper")

    def check(self, plan: Plan) -> None:
        """What can be wrong before anything is written down. Raises ConfigError."""
        if not plan.needed:
            return
        kinds = {kind_of(plan.stages[identity]) for identity in plan.needed} | {"align", "aggregate"}
        for kind in sorted(kinds - {"aggregate"}):
            for point in plan.points:
                self._check_share(kind, point)
                if self.resources[kind].tasks > 1 and point.engine.strategy == "none":
                    raise ConfigError(
                        f"hydra.launcher: {kind} jobs have {self.resources[kind].tasks} GPUs, but engine="
                        f"{point.engine.name} uses one: choose engine=ddp, or give the job gpus_per_node=1"
                    )
        from launchers.slurm import cluster

        cluster.check_there()
        for kind in sorted(kinds):
            cluster.check_request(kind, self.resources[kind].sbatch())

    def _check_share(self, kind: str, point: Point) -> None:
        """Every process of a job that trains must have an example of each step."""
        stage = {"sft": "sft", "align": "align"}.get(kind)
        if stage is None:
            return
        size, tasks = getattr(point.trainer, stage).batch_size, self.resources[kind].tasks
        if size < tasks:
            raise ConfigError(
                f"trainer.{stage}.batch_size={size}: below the {tasks} processes of a {kind} job, each of which needs"
                " an example a step; lower hydra.launcher.gpus_per_node or nodes"
            )

    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure] | None:
        """Submit what is neither done nor on its way. Returns the points that were not reached once all has ended;
        None when jobs go on, the last of which calls `finalize` with them.

        Raises ConfigError when SLURM refuses a job, SlurmUnavailable when it does not answer.
        """
        from launchers.slurm import cluster
        from launchers.slurm import job_records as ledger

        if not plan.needed and not ledger.submissions(folder):
            return {}
        from launchers.slurm.status import look, lost_points
        from launchers.slurm.status_table import announce, watch
        from launchers.slurm.submit import submit

        def leave() -> set[str]:
            if self.retry_failed:
                return set()
            return {p.identity for p in look(folder.path).points if p.state in ("failed", "cancelled")}

        try:
            with Lease(folder.store.sweeps / ".submitting", _say_once()):
                submitted = submit(
                    plan,
                    folder,
                    finalize,
                    self.resources,
                    leave(),
                    self.array_parallelism,
                    self.signal_delay_s,
                    self.upload,
                )
        except (ConfigError, cluster.SlurmUnavailable):
            if plan.needed:
                raise
            return {}  # all is there, and SLURM not to be asked
        announce(plan, folder.path, submitted)
        if _nothing_to_wait_for(submitted):
            return lost_points(folder.path)
        if not self.wait:
            return None
        watch(folder.path)
        return lost_points(folder.path)


def _nothing_to_wait_for(submitted: Submitted) -> bool:
    return not submitted.submissions and not submitted.on_their_way


def _say_once() -> Callable[[str], bool]:
    """For a lease: whom it waits for, told as often as that changes."""
    told: set[str] = set()

    def waiting(holder: str) -> bool:
        if holder not in told:
            told.add(holder)
            print(f"waiting for another submission to this store ({holder})", flush=True)
        return False

    return waiting


def _plain(node: Any) -> Any:
    """Without OmegaConf's containers."""
    if OmegaConf.is_config(node):
        return OmegaConf.to_container(node)
    return {key: _plain(value) for key, value in node.items()} if isinstance(node, dict) else node
