"""The interface between the sweeper and the launchers: a launcher computes the stages of a plan."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from src.errors import PointFailure
from src.planning.plan import Plan
from src.store.sweep_folder import SweepFolder


@runtime_checkable
class PlanLauncher(Protocol):
    """A launcher that runs plans, where Hydra's own launchers run lists of overrides."""

    runs_in_process: bool  # whether `launch_plan` computes the points itself, or only submits jobs that do

    def check(self, plan: Plan) -> None:
        """Raise ConfigError for a plan that cannot run here. Called before anything is written."""

    def launch_plan(self, plan: Plan, folder: SweepFolder, finalize: str) -> dict[str, PointFailure] | None:
        """Compute what the plan needs and return the points without a result: identity of the result -> why.

        finalize: "MODULE:FUNCTION". A launcher whose jobs outlive this process returns None; its last job calls
        FUNCTION(folder.path, failures) once all others have ended, with the failures that would be returned here.
        """
