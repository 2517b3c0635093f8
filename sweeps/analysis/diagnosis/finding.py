"""What a rule finds, and the arithmetic that rules share."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from sweeps.analysis.significance import Z95

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

SEVERITIES = ("severe", "warning", "note")  # the worst first
MAX_RATIO = 10.0  # between a value of a grid and the next one that is proposed


class Finding(NamedTuple):
    """One thing that a rule found.

    overrides: what to change in the sweep's command, so that the next run shows more; empty where no run would.
    """

    rule: str
    severity: str  # one of SEVERITIES
    text: str  # a sentence with the numbers, without a full stop
    overrides: Mapping[str, str] = {}


def that_fired(*findings: Finding | None) -> list[Finding]:
    """Return the findings of those rules that found something."""
    return [finding for finding in findings if finding is not None]


def is_above(value: float, error: float, other: float, other_error: float = 0.0) -> bool:
    """Return whether a value is above another one beyond their standard errors; False where one is missing (NaN)."""
    return value - other > Z95 * math.hypot(error, other_error)


def mean_and_error(values: NDArray[np.float64]) -> tuple[float, float]:
    """Return the mean of at least two values and its standard error."""
    return float(values.mean()), float(values.std(ddof=1) / math.sqrt(len(values)))


def values_text(values: Sequence[float]) -> str:
    """Return values as an override has them: `0.1,0.3`."""
    return ",".join(f"{value:g}" for value in values)


def continued(last: float, before: float) -> list[float]:
    """Return two values that continue a grid beyond its `last` one, by its own ratio or at most MAX_RATIO."""
    ratio = min(max(last / before, 1 / MAX_RATIO), MAX_RATIO)
    return [rounded(last * ratio), rounded(last * ratio**2)]


def rounded(value: float) -> float:
    """Return the value with two significant digits."""
    return float(f"{value:.1e}")
