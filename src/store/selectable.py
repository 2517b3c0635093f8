"""Which points of an unfinished sweep its rule may still select, whatever the missing results turn out to be. No torch.

`sweeps.analysis.selection` selects. This bounds it: a point is given up only when no completion of the sweep selects
it, so a decision that holds for the results of now holds for those of later, and several processes may decide at once.
Quality is a mean of values in [0, 1], by the contract of judges, over prompts that are the same for a whole study.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterable
from dataclasses import dataclass, field
from functools import cache
from typing import NamedTuple

STUDY = ("setup", "method", "init", "variant")  # one beta and one lr are selected for each combination of these columns
_ROUNDING = 1e-9  # means of several seeds that differ by less may be equal, or ordered otherwise, when selected from


class Measured(NamedTuple):
    """A point as the selection sees it."""

    result: str  # identity
    study: tuple[str, ...]  # its values of STUDY
    beta: float
    lr: float
    quality: float | None  # mean over the selection prompts; None while there is no result
    num_prompts: int  # that select


@dataclass
class _Row:
    """The seeds of a point. `low` and `high` bound the mean of those that will have a result."""

    beta: float
    lr: float
    results: list[str] = field(default_factory=list)
    qualities: list[float] = field(default_factory=list)
    num_missing: int = 0

    @property
    def low(self) -> float:
        return math.fsum(self.qualities) / (len(self.qualities) + self.num_missing)

    @property
    def high(self) -> float:
        return (math.fsum(self.qualities) + self.num_missing) / (len(self.qualities) + self.num_missing)

    @property
    def is_exact(self) -> bool:
        return len(self.qualities) == 1 and not self.num_missing

    @property
    def rank(self) -> tuple[float, float, float]:
        """The order of exact rows: of equals the larger beta is selected, then the smaller lr."""
        return self.low, self.beta, -self.lr

    def is_behind(self, other: _Row) -> bool:
        """Return whether this row stays behind the other whatever is missing."""
        if self.is_exact and other.is_exact:
            return self.rank < other.rank
        return self.high < other.low - _ROUNDING


def selectable(points: Iterable[Measured], rule: str) -> set[str]:
    """Return the results, of those that are there, that a point selected by `rule` may be an average of.

    points: all that compete, with the missing ones. rule: sweep.select, best or lowest_kl_in_shortlist.
    """
    studies: dict[tuple[str, ...], list[Measured]] = defaultdict(list)
    for point in points:
        studies[point.study].append(point)
    return {result for study in studies.values() for row in _rows(study, rule) for result in row.results}


def _rows(study: list[Measured], rule: str) -> list[_Row]:
    """Return the rows of a study that may still be selected."""
    rows: dict[tuple[float, float], _Row] = {}
    for point in study:
        row = rows.setdefault((point.beta, point.lr), _Row(point.beta, point.lr))
        if point.quality is None:
            row.num_missing += 1
        else:
            row.results.append(point.result)
            row.qualities.append(point.quality)
    measured = [row for row in rows.values() if row.results]
    if not measured or not all(0 <= value <= 1 for row in measured for value in row.qualities):
        return measured  # of other values there are no bounds
    leader = max(measured, key=lambda row: row.low)
    if rule != "best":
        sizes = {point.num_prompts for point in study if point.quality is not None}
        return [row for row in measured if len(sizes) > 1 or _may_be_similar(row.high, leader.low, sizes.copy().pop())]
    leaders = [leader, *sorted((row for row in measured if row.is_exact), key=lambda row: row.rank)[-1:]]
    return [row for row in measured if not any(row.is_behind(other) for other in leaders)]


def _may_be_similar(quality: float, best: float, n: int) -> bool:
    """Return whether a row of at most this quality may be in the shortlist of a best row of at least `best`.

    It is there unless the mean d of n paired differences is significant, d > t s / sqrt(n). For values in [0, 1] with
    means a and b the mean of squared differences is at most min(a + b, 2 - a - b). Once d is too large for b = best,
    it is for every larger b and smaller a.
    """
    if n < 2:
        return True
    difference = best - quality
    mean_square = min(best + quality, 2 - best - quality)
    variance = (mean_square - difference**2) * n / (n - 1)
    return difference <= _ROUNDING or difference <= _critical(n) * math.sqrt(max(0.0, variance)) + _ROUNDING


@cache
def _critical(n: int) -> float:
    """Return how many standard deviations of n paired differences their mean has when it just is significant."""
    from scipy.stats import t

    return float(t.ppf(0.975, n - 1)) / math.sqrt(n)
