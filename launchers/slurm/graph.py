"""Plan -> jobs: each shared stage one job, points in arrays, edges as dependencies. Nothing here talks to SLURM."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from src.planning.plan import Plan
from src.planning.stage import Stage

SHARED = ("sft", "reference", "baseline")


def kind_of(stage: Stage) -> str:
    """Which resources it is computed with."""
    return stage.role if stage.role in SHARED else "align"


@dataclass
class Work:
    """What one job, or one task of an array, computes."""

    label: str
    own: list[Stage]  # what it is there for
    stages: list[Stage]  # those and whatever of the plan they rest on: a job alone is complete


@dataclass
class Group:
    """What one sbatch submits."""

    kind: str  # which resources: sft, reference, baseline, align
    work: list[Work]
    needs: tuple[str, ...]  # identities of stages that other jobs compute first
    parallel: int | None = None  # how many of its tasks may run at once; None: all


def groups(plan: Plan, elsewhere: Collection[str], leave: Collection[str], array_size: int) -> Iterator[Group]:
    """The sbatches a plan needs, in an order in which every one comes after those it needs.

    elsewhere: stages that queued or running jobs compute already; leave: results not to be computed.
    """
    left = {identity for identity in plan.needed if identity not in elsewhere}
    users: dict[str, int] = defaultdict(int)
    wanted: set[str] = set()
    for own in plan.point_stages:
        if own[-1] in left and own[-1] not in leave:
            wanted.update(own)
            for identity in own:
                users[identity] += 1
    left &= wanted

    def shared(identity: str) -> bool:
        return plan.stages[identity].role in SHARED or users[identity] > 1

    def work(label: str, own: list[Stage]) -> Work:
        below = {identity for stage in own for identity in _upstream(stage)}
        rest = [s for i, s in plan.stages.items() if i in plan.needed and (i in below or s in own)]
        return Work(label, own, rest)

    def needs(own: list[Stage]) -> tuple[str, ...]:
        names = {stage.identity for stage in own}
        direct = {up.identity for stage in own for up in stage.upstream.values()} - names
        return tuple(identity for identity in plan.stages if identity in direct & plan.needed)

    for identity, stage in plan.stages.items():
        if identity in left and shared(identity):
            yield Group(kind_of(stage), [work(stage.label, [stage])], needs([stage]))
    points: dict[tuple[str, ...], list[Work]] = defaultdict(list)
    for point, own in zip(plan.points, plan.point_stages, strict=True):
        if own[-1] in left and own[-1] not in leave:
            alone = [plan.stages[i] for i in own if i in left and not shared(i)]
            points[needs(alone)].append(work(point.label, alone))
    for needed, together in points.items():
        for start in range(0, len(together), array_size):
            yield Group("align", together[start : start + array_size], needed)


def _upstream(stage: Stage) -> Iterator[str]:
    for up in stage.upstream.values():
        yield up.identity
        yield from _upstream(up)


def shares(total: int | None, sizes: list[int]) -> list[int | None]:
    """How many tasks of each array may run at once so that the sweep keeps to `total`, as far as one each allows."""
    if total is None:
        return [None] * len(sizes)
    everything = sum(sizes)
    exact = [total * size / everything for size in sizes]
    given = [min(size, max(1, int(e))) for size, e in zip(sizes, exact, strict=True)]
    by_rest = sorted(range(len(sizes)), key=lambda i: given[i] - exact[i])
    for i in by_rest:
        if sum(given) < total and given[i] < sizes[i]:
            given[i] += 1
    return list(given)
