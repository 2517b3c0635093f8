"""Distances to a result in float64, and the worst of several."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting

# Below it an error is that of a few float32 roundings: such a yardstick would make nothing out of a ratio of 2.
_LEAST_YARDSTICK = 1e-7


def relative(actual: Tensor, expected: Tensor) -> float:
    """Return the norm of the difference over the norm of what is expected, both in float64."""
    return float((actual.detach().double() - expected.detach().double()).norm() / expected.detach().double().norm())


def relative_errors(actual: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    return [relative(a, e) for a, e in zip(actual, exact, strict=True)]


def error_ratios(actual: Sequence[Tensor], plain: Sequence[Tensor], exact: Sequence[Tensor]) -> list[float]:
    """Return each tensor's distance to the exact one over the distance of a plain computation in the same precision."""
    yardsticks = (max(error, _LEAST_YARDSTICK) for error in relative_errors(plain, exact))
    return [error / yardstick for error, yardstick in zip(relative_errors(actual, exact), yardsticks, strict=True)]


def worst(setting: Setting, label: str, values: Sequence[float], names: Sequence[str], limit: Limit) -> Row:
    """Return the row of the largest value, with its name in the note; NaN is larger than any."""
    index = max(range(len(values)), key=lambda i: float("inf") if values[i] != values[i] else values[i])
    return setting.row(label, values[index], "", limit, names[index])
