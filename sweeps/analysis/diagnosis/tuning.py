"""What a grid over beta or lr shows, and what it is too small to show."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

from sweeps.analysis.diagnosis.finding import Finding, continued, is_above, rounded, values_text


class GridPoint(NamedTuple):
    """One value of a grid: quality on the selection split with its error, and the mean margin of scores, nats."""

    value: float
    quality: float
    error: float
    margin: float


def over_optimized(name: str, grid: Sequence[GridPoint], best: int) -> tuple[Finding, float] | None:
    """Find that margins grow beyond the best point while quality falls; return also the value where it is worst.

    The proxy that pairs train is then no longer what is wanted: over-optimization (Gao et al., arXiv 2210.10760;
    Rafailov et al., arXiv 2406.02900). name: beta or lr. grid: ascending by value. best: index of the best point.
    """
    chosen = grid[best]
    worse = [
        point
        for point in grid
        if point.margin > chosen.margin and is_above(chosen.quality, chosen.error, point.quality, point.error)
    ]
    if not worse:
        return None
    worst = min(worse, key=lambda point: point.quality)
    text = (
        f"from {name} {chosen.value:g} to {worst.value:g} the margin of held-out pairs grows from {chosen.margin:.3g} "
        f"to {worst.margin:.3g} (score without beta) while quality falls from {chosen.quality:.3f} to "
        f"{worst.quality:.3f}"
    )
    neighbor = grid[best + 1] if worst.value > chosen.value else grid[best - 1]
    between = rounded(math.sqrt(chosen.value * neighbor.value))
    return Finding("quality falls as margins grow", "warning", text, {name: f"{between:g}"}), worst.value


def border(name: str, grid: Sequence[GridPoint], best: int) -> Finding | None:
    """Find that the best value is the smallest or largest one of its grid: the optimum may lie beyond.

    It is no more than a note where the value beside it is as good within noise. A single value is no grid.
    """
    if len(grid) < 2 or 0 < best < len(grid) - 1:
        return None
    inner = grid[1] if best == 0 else grid[-2]
    chosen, end = grid[best], "smallest" if best == 0 else "largest"
    is_better = is_above(chosen.quality, chosen.error, inner.quality, inner.error)
    text = (
        f"the best {name}, {chosen.value:g}, is the {end} of the {len(grid)} that were tried: the optimum may lie "
        f"beyond (quality {chosen.quality:.3f}, {inner.quality:.3f} at {inner.value:g}"
        f"{'' if is_better else ', the same within noise'})"
    )
    beyond = sorted(continued(chosen.value, inner.value))
    return Finding(f"{name} on the border", "warning" if is_better else "note", text, {name: values_text(beyond)})
