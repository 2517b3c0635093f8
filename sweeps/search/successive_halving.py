"""Successive halving, pure decision logic (no I/O, deterministic): which points are promoted to the next rung.

Every point is trained to a fraction of its steps, the better ones to the next fraction, and so on.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor
from statistics import fmean
from typing import Any

from src.config.schema import Point


def with_stop(point: Point, stop_fraction: float) -> Point:
    """Return the point trained to that fraction of its alignment steps; before its end no further judge is asked."""
    align = replace(point.trainer.align, stop_fraction=stop_fraction)
    judges = point.judges if stop_fraction == 1 else {}
    return replace(point, trainer=replace(point.trainer, align=align), judges=judges)


def entry_rungs(
    points: Sequence[Point], has_full_run: Sequence[bool], has_first_rung: Sequence[bool], last_rung: int
) -> list[int]:
    """Return the rung (from 0) at which each point enters; seeds of one point enter together.

    has_full_run, has_first_rung: whether a point has the result of its full run, and that of the first rung. A point
    with the former alone has no steps left to save, so it enters at the last rung.
    """
    entry = [0] * len(points)
    for group in _seed_groups(points, range(len(points))):
        if all(has_full_run[i] for i in group) and not any(has_first_rung[i] for i in group):
            for i in group:
                entry[i] = last_rung
    return entry


def promote(
    points: Sequence[Point], rung_of: Sequence[int], quality: Sequence[float | None], rung: int, keep_fraction: float
) -> list[int]:
    """Return the rung of each point after `rung` has finished.

    Of the seed groups of each study that reached `rung`, the best `keep_fraction` are promoted, at least one. They are
    ranked by mean quality; of equals the larger beta comes first, then the smaller lr. A rejected group stays.

    quality: on the selection prompts, of the points at this rung; None (no result) is never promoted.
    """
    promoted = list(rung_of)
    studies: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for group in _seed_groups(points, [i for i, reached in enumerate(rung_of) if reached == rung]):
        studies[points[group[0]].study].append(group)
    for groups in studies.values():
        num_promoted = max(1, floor(keep_fraction * len(groups) + 1e-9))  # 0.29 * 100 is 28.999999999999996
        ranked: list[tuple[float, float, float, list[int]]] = []
        for group in groups:
            known = {i: value for i in group if (value := quality[i]) is not None}
            if known:
                point = points[group[0]]
                ranked.append((-fmean(known.values()), -point.beta, point.lr, list(known)))
        for *_, members in sorted(ranked)[:num_promoted]:
            for i in members:
                promoted[i] = rung + 1
    return promoted


def _seed_groups(points: Sequence[Point], indices: Sequence[int]) -> Iterator[list[int]]:
    """Yield lists of those `indices` whose points differ only in their seed."""
    groups: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i in indices:
        groups[points[i].without_seed].append(i)
    yield from groups.values()


@dataclass(frozen=True)
class RungState:
    """The progress of a search; a full grid has one rung."""

    points: tuple[Point, ...]  # each trained to its end
    rungs: tuple[float, ...]  # fractions of the alignment steps
    keep_fraction: float
    rung: int  # the current one, from 0
    entry: tuple[int, ...]  # point -> the rung it entered at
    rung_of: tuple[int, ...]  # point -> the rung it has reached
    results: tuple[tuple[str, ...], ...]  # rung -> point -> identity of its result there

    @property
    def is_halving(self) -> bool:
        return len(self.rungs) > 1

    @property
    def is_last(self) -> bool:
        return self.rung == len(self.rungs) - 1

    @property
    def description(self) -> dict[str, Any] | None:
        """The key `search` of sweep.json, None for a full grid. Rungs count from 1 there."""
        if not self.is_halving:
            return None
        return {
            "kind": "successive_halving",
            "rungs": list(self.rungs),
            "keep_fraction": self.keep_fraction,
            "rung": self.rung + 1,
        }

    def describe_point(self, index: int) -> dict[str, Any]:
        """Return the keys of one point in sweep.json; none for a full grid.

        earlier: its results in the rungs before the one it reached; full_result: its result in the last rung.
        """
        if not self.is_halving:
            return {}
        reached = self.rung_of[index]
        return {
            "rung": reached + 1,
            "earlier": [self.results[r][index] for r in range(self.entry[index], reached)],
            "full_result": self.results[-1][index],
        }


def expected_counts(state: RungState) -> list[int]:
    """Return the number of points in each rung when the current one is the next to finish and no point fails."""
    final, num_rungs = list(state.rung_of), len(state.rungs)
    for rung in range(state.rung, num_rungs - 1):
        final = promote(state.points, final, [0.0] * len(final), rung, state.keep_fraction)
    return [sum(low <= r <= high for low, high in zip(state.entry, final, strict=True)) for r in range(num_rungs)]


def is_candidate(sweep: dict[str, Any], point: dict[str, Any]) -> bool:
    """Return whether a point of a sweep.json may be selected: in a search by rungs only if it reached the last one."""
    search = sweep.get("search")
    return search is None or point["rung"] == len(search["rungs"])


def points_per_rung(sweep: dict[str, Any]) -> dict[str, list[int]]:
    """Return method -> the number of its points in each rung, of a sweep.json; empty for a full grid."""
    if (search := sweep.get("search")) is None:
        return {}
    rows: dict[str, list[int]] = {}
    for point in sweep["points"]:
        counts = rows.setdefault(point["method"], [0] * len(search["rungs"]))
        for rung in range(point["rung"] - 1 - len(point["earlier"]), point["rung"]):
            counts[rung] += 1
    return rows


def summary(sweep: dict[str, Any]) -> str | None:
    """Return one line about the search of a sweep.json; None for a full grid."""
    if not (rows := points_per_rung(sweep)):
        return None
    search = sweep["search"]
    totals = [sum(counts) for counts in zip(*rows.values(), strict=True)]
    parts = [f"{count} at {stop:g}" for count, stop in zip(totals, search["rungs"], strict=True)]
    text = f"successive_halving: points trained to each fraction of the steps: {', '.join(parts)}"
    if search["rung"] == len(search["rungs"]):
        return text
    return f"{text}; rung {search['rung']} of {len(search['rungs'])}, no point is selected before the last"


def dry_run_table(state: RungState) -> str:
    """Return the rungs of a search and their cost, for `dry_run=true`."""
    counts, num_points = expected_counts(state), len(state.points)
    reused = sum(first > 0 for first in state.entry)  # results of full runs: nothing is computed for them
    computed = [*counts[:-1], counts[-1] - reused]
    fractions = [stop - start for start, stop in zip([0.0, *state.rungs], state.rungs, strict=False)]
    steps = sum(fraction * count for fraction, count in zip(fractions, computed, strict=True))
    lines = [
        "",
        f"search: successive_halving; {state.keep_fraction:g} of each method's points are promoted to the next rung",
        "rung  steps  points",
    ]
    lines += [f"{r + 1:4} {stop:6g} {count:7}" for r, (stop, count) in enumerate(zip(state.rungs, counts, strict=True))]
    if reused:
        lines.append(f"{reused} points have results of full runs: they enter at the last rung")
    lines.append(
        f"alignment: the steps of {steps:g} full runs, {100 * steps / num_points:.0f} % of the {num_points} of the "
        f"full grid; {sum(computed)} models sampled and evaluated instead of {num_points}"
    )
    return "\n".join(lines)
