"""Points of several sweeps that have equal settings and different results, and why they have."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

from src.errors import ConfigError
from src.store.selectable import STUDY
from src.store.store import FURTHER_JUDGE

if TYPE_CHECKING:
    import pandas as pd

SETTINGS = [*STUDY, "beta", "lr", "seed"]


def check_conflicts(points: pd.DataFrame, stages_of: Callable[[str], Mapping[str, str]]) -> None:
    """Raise ConfigError for different points with equal settings, which would be averaged like seeds.

    stages_of: role -> identity of the stages of the point with a result.
    """
    pairs = points.merge(points.drop_duplicates(SETTINGS), on=SETTINGS, suffixes=("", "_other"))
    for row in pairs[pairs.identity != pairs.identity_other].head(1).to_dict("records"):
        point = f"{row['method']} beta={row['beta']:g} lr={row['lr']:g} seed={row['seed']} of setup={row['setup']}"
        one, other = stages_of(row["identity_other"]), stages_of(row["identity"])
        judges = _further_judges(one) ^ _further_judges(other)
        if judges and one["generate"] == other["generate"]:
            names = ", ".join(sorted({role.removeprefix(FURTHER_JUDGE) for role, _ in judges}))
            raise ConfigError(
                f"the sweeps contain {point} twice: the same samples, judged by {names} in one of them alone (as "
                "sweeps.rejudge does); aggregate them one by one"
            )
        raise ConfigError(
            f"the sweeps contain conflicting results for {point} with identical settings (data or a model edited in "
            "place, or results of an older version); aggregate them one by one"
        )


def _further_judges(stages: Mapping[str, str]) -> set[tuple[str, str]]:
    """Return role and identity of the stages of further judges of a point."""
    return {(role, identity) for role, identity in stages.items() if role.startswith(FURTHER_JUDGE)}
