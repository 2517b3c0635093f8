"""Successive halving: every point a part of its steps, the better ones more. Decisions alone: nothing here is read or
written, and equal results give equal decisions."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from math import floor
from statistics import fmean
from typing import Any

from src.config.schema import Point


def stopped(point: Point, stop: float) -> Point:
    """The point, trained to that share of its steps."""
    return replace(point, trainer=replace(point.trainer, align=replace(point.trainer.align, stop_fraction=stop)))


def begin(points: Sequence[Point], whole: Sequence[bool], first: Sequence[bool], last: int) -> list[int]:
    """The rung (from 0) at which each point enters. Those that differ in nothing but their seed stay together.

    whole, first: whether a point has a result of its whole run, of the first rung. Who has the former alone has nothing
    left to save: it meets the others in the last rung.
    """
    at = [0] * len(points)
    for group in _groups(points, range(len(points))):
        if all(whole[i] for i in group) and not any(first[i] for i in group):
            for i in group:
                at[i] = last
    return at


def advance(
    points: Sequence[Point], at: Sequence[int], quality: Sequence[float | None], rung: int, share: float
) -> list[int]:
    """Where each point is once `rung` has ended: of each study the share of its groups of seeds with the highest mean
    quality is one further, at least one; of equals the larger beta, then the smaller lr.

    quality: on the selection prompts, of the points at this rung; None where there is no result, which goes no further.
    """
    after = list(at)
    studies: dict[tuple[str, ...], list[list[int]]] = defaultdict(list)
    for group in _groups(points, [i for i, reached in enumerate(at) if reached == rung]):
        studies[_study(points[group[0]])].append(group)
    for groups in studies.values():
        ranked: list[tuple[float, float, float, list[int]]] = []
        for group in groups:
            known = [(i, value) for i in group if (value := quality[i]) is not None]
            if known:
                point, mean = points[group[0]], fmean(value for _, value in known)
                ranked.append((-mean, -point.beta, point.lr, [i for i, _ in known]))
        for *_, going in sorted(ranked)[: _places(len(groups), share)]:
            for i in going:
                after[i] = rung + 1
    return after


def foreseen(
    points: Sequence[Point], start: Sequence[int], at: Sequence[int], rung: int, rungs: int, share: float
) -> list[int]:
    """How many points are met in each rung, when `rung` is the next to end and none fails. start: of begin."""
    after = list(at)
    for r in range(rung, rungs - 1):
        after = advance(points, after, [0.0] * len(points), r, share)
    return [sum(low <= r <= high for low, high in zip(start, after, strict=True)) for r in range(rungs)]


def _places(groups: int, share: float) -> int:
    return max(1, floor(share * groups + 1e-9))  # 0.29 * 100 is 28.999999999999996


def _groups(points: Sequence[Point], which: Sequence[int]) -> Iterator[list[int]]:
    """Those of `which` that differ in nothing but their seed."""
    found: dict[tuple[Any, ...], list[int]] = defaultdict(list)
    for i in which:
        found[*_study(points[i]), points[i].beta, points[i].lr].append(i)
    yield from found.values()


def _study(point: Point) -> tuple[str, ...]:
    """What a best point is chosen of, as sweeps.analysis.selection.STUDY."""
    return point.setup.name, point.method.name, point.init.name, point.sweep.variant


@dataclass(frozen=True)
class Standing:
    """How far a search is, for sweep.json."""

    rungs: tuple[float, ...]  # shares of the steps
    share: float
    rung: int  # that is run, from 0
    start: tuple[int, ...]  # the rung at which each point entered, from 0
    at: tuple[int, ...]  # the one it has reached
    results: tuple[tuple[str, ...], ...]  # rung -> point -> identity of its result there

    @property
    def over(self) -> bool:
        """Whether no other rung comes."""
        return self.rung == len(self.rungs) - 1

    @property
    def described(self) -> dict[str, Any]:
        return {"kind": "successive_halving", "rungs": list(self.rungs), "share": self.share, "rung": self.rung + 1}

    def of_point(self, index: int) -> dict[str, Any]:
        """earlier: its results of the rungs before the one it has reached."""
        reached = self.at[index]
        return {"rung": reached + 1, "earlier": [self.results[r][index] for r in range(self.start[index], reached)]}


def is_candidate(sweep: dict[str, Any], point: dict[str, Any]) -> bool:
    """Of a sweep.json and one of its points: may it be a method's best? In a halving search the last rung's may."""
    search = sweep.get("search")
    return search is None or point["rung"] == len(search["rungs"])


def entered(sweep: dict[str, Any]) -> list[tuple[str, list[int]]]:
    """How many points of each method were in each rung, of a sweep.json; empty when it was no such search."""
    if (search := sweep.get("search")) is None:
        return []
    rows: dict[str, list[int]] = {}
    for point in sweep["points"]:
        counts = rows.setdefault(point["method"], [0] * len(search["rungs"]))
        for rung in range(point["rung"] - 1 - len(point["earlier"]), point["rung"]):
            counts[rung] += 1
    return list(rows.items())


def line(sweep: dict[str, Any]) -> str | None:
    """What people are told of such a search; None of another."""
    if not (rows := entered(sweep)):
        return None
    search = sweep["search"]
    totals = [sum(own) for own in zip(*(counts for _, counts in rows), strict=True)]
    parts = [
        f"{count} at {'the end' if stop == 1 else format(stop, 'g')}"
        for count, stop in zip(totals, search["rungs"], strict=True)
    ]
    said = f"halving: points at each share of the steps: {', '.join(parts)}"
    ended = search["rung"] == len(search["rungs"])
    return said if ended else f"{said}; rung {search['rung']} of {len(search['rungs'])}, nothing is chosen yet"


def table(
    points: Sequence[Point],
    start: Sequence[int],
    at: Sequence[int],
    rung: int,
    rungs: Sequence[float],
    share: float,
) -> str:
    """What a search takes, for `dry_run=true`; the other arguments are those of foreseen."""
    counts, full = foreseen(points, start, at, rung, len(rungs), share), len(points)
    there = sum(first > 0 for first in start)  # results of whole runs, which take nothing
    computed = [*counts[:-1], counts[-1] - there]
    parts = [stop - low for low, stop in zip([0.0, *rungs], rungs, strict=False)]
    steps = sum(part * count for part, count in zip(parts, computed, strict=True))
    lines = ["", f"search: halving; {share:g} of each method's points go on to the next rung", "rung  steps  points"]
    lines += [f"{r + 1:4} {stop:6g} {count:7}" for r, (stop, count) in enumerate(zip(rungs, counts, strict=True))]
    if there:
        lines.append(f"{there} points have results of whole runs: they meet the others in the last rung")
    lines.append(
        f"alignment: the steps of {steps:g} whole runs, {100 * steps / full:.0f} % of the {full} of the full grid; "
        f"{sum(computed)} times sampled and evaluated instead of {full}"
    )
    return "\n".join(lines)
