"""The interface between the sweeper and the launchers: a launcher computes the stages of a plan."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

from hydra.core.utils import JobReturn
from hydra.plugins.launcher import Launcher

from src.errors import ConfigError, PointFailure
from src.estimates.forecast import Forecast
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.sweep_folder import SweepFolder


class PlanLauncher(Launcher):
    """A launcher that runs plans, where Hydra's own launchers run lists of overrides."""

    runs_in_process: bool  # whether `launch_plan` computes the points itself, or only submits jobs that do

    def setup(self, **context: Any) -> None:
        pass  # a plan contains the resolved configs

    def launch(self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int) -> Sequence[JobReturn]:
        raise ConfigError("this hydra/launcher runs plans, which hydra/sweeper=grid makes; choose that sweeper")

    @abstractmethod
    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a plan that cannot run here. Called before anything is written."""

    @abstractmethod
    def num_processes(self, stage: Stage) -> int:
        """Return how many processes compute the stage together, each on a card of its own."""

    def starts_job(self, stage: Stage) -> bool:
        """Return whether a process is started, and accelerators are held for it, with this stage."""
        return False

    def settle(self, plan: Plan, forecast: Forecast) -> str:
        """Decide what is left to an estimate; return a line that says what and why, "" when nothing is."""
        return ""

    def max_running(self, plan: Plan) -> int:
        """Return how many points of the plan are computed at once, at most."""
        return max(1, plan.num_points_to_compute)

    def on_gpus(self, number: int) -> str:
        """Return the overrides of a sweep whose training stages are each computed on a number of GPUs."""
        nodes = f"hydra.launcher.nodes={number // 8} " if number > 8 else ""
        return f"{nodes}hydra.launcher.gpus_per_node={min(8, number)}"

    @abstractmethod
    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure] | None:
        """Compute what the plan needs and return the points without a result: identity of the result -> why.

        finalize: "MODULE:FUNCTION". A launcher whose jobs outlive this process returns None; its last job calls
        FUNCTION(folder.path, failures) once all others have ended, with the failures that would be returned here.
        """
