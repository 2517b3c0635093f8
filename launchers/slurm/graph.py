"""Plan -> jobs: one job per shared stage, job arrays of points, and the dependencies between them. Calls no SLURM.

A point is one task of an array; with sampling in jobs of its own it is the same task of two, of which the second
follows the first task by task.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Collection, Iterator
from dataclasses import dataclass

from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.store import SHARED_ROLES


def job_kind(stage: Stage, own_sampling: bool = False) -> str:
    """Return the kind of job that computes the stage: a key of hydra.launcher.kinds.

    own_sampling: whether jobs of their own sample and evaluate what others have aligned.
    """
    if stage.role in SHARED_ROLES:
        return stage.role
    return "sample" if own_sampling and stage.kind != "align" else "align"


@dataclass
class JobTask:
    """What is submitted for one point, or for one shared stage."""

    label: str
    targets: list[Stage]  # the stages it is submitted for
    stages: list[Stage]  # the targets and everything upstream that is not done: a task can run alone


# An array that follows another one task by task has at most so many: SLURM tests the first ones against the task with
# their number, and later ones against all tasks once theirs is forgotten (correspond_after_task_cnt, at least 10).
MAX_FOLLOWING = 10

_Parts = dict[str, JobTask]  # of a point: kind of job -> what a job of this kind is submitted for, in order


@dataclass
class JobArray:
    """One call of sbatch: a job array, or a single job."""

    kind: str  # one of SHARED_ROLES, align or sample
    jobs: list[list[JobTask]]  # the tasks of each job: several where a job computes several points
    upstream: tuple[str, ...]  # identities of the stages that other jobs have to compute first
    follows: JobArray | None = None  # each job waits for the one with its number in that array, and not for the others
    parallelism: int | None = None  # the number of jobs that may run at once; None: all


def job_arrays(
    plan: Plan,
    in_flight: Collection[str],
    skipped: Collection[str],
    max_array_size: int,
    points_per_job: int = 1,
    own_sampling: bool = False,
) -> Iterator[JobArray]:
    """Yield the sbatch calls that a plan needs, each after those it depends on.

    in_flight: identities of stages that queued or running jobs compute. skipped: results not to be computed.
    points_per_job: how many of the points that wait for the same stages one job computes. When it computes several,
    those that share a stage, such as an alignment that two judges see, are in one job, which may have more points then.
    own_sampling: points are sampled and evaluated in jobs of their own; with one point a job.
    """
    todo = {identity for identity in plan.needed if identity not in in_flight}
    points = [
        (plan.points[index], stage_ids)
        for index in plan.start_order
        if (stage_ids := plan.point_stages[index])[-1] in todo and stage_ids[-1] not in skipped
    ]
    num_points = Counter(identity for _, stage_ids in points for identity in stage_ids)
    todo &= num_points.keys()

    def is_shared(identity: str) -> bool:
        return plan.stages[identity].role in SHARED_ROLES or (points_per_job == 1 and num_points[identity] > 1)

    def task(label: str, targets: list[Stage]) -> JobTask:
        upstream = {identity for stage in targets for identity in _all_upstream(stage)}
        stages = [s for i, s in plan.stages.items() if i in plan.needed and (i in upstream or s in targets)]
        return JobTask(label, targets, stages)

    def upstream_of(targets: list[Stage]) -> tuple[str, ...]:
        direct = {up.identity for stage in targets for up in stage.upstream.values()}
        direct = (direct - {stage.identity for stage in targets}) & plan.needed
        return tuple(identity for identity in plan.stages if identity in direct)

    for identity, stage in plan.stages.items():
        if identity in todo and is_shared(identity):
            kind = job_kind(stage, own_sampling)
            yield JobArray(kind, [[task(stage.label, [stage])]], upstream_of([stage]))
    # Points that share a stage share the first one that is to do.
    together: dict[str, list[_Parts]] = defaultdict(list)
    for point, stage_ids in points:
        targets = [plan.stages[i] for i in stage_ids if i in todo and not is_shared(i)]
        kinds = [job_kind(stage, own_sampling) for stage in targets]
        parts = {
            kind: task(point.label, [s for s, k in zip(targets, kinds, strict=True) if k == kind]) for kind in kinds
        }
        together[targets[0].identity].append(parts)
    by_upstream: dict[tuple[tuple[str, tuple[str, ...]], ...], list[list[_Parts]]] = defaultdict(list)
    for group in together.values():
        aligned = {stage.identity for parts in group if "sample" in parts for stage in _targets_of(parts, "align")}
        needs = ((kind, upstream_of([s for parts in group for s in _targets_of(parts, kind)])) for kind in group[0])
        key = tuple((kind, tuple(i for i in upstream if i not in aligned)) for kind, upstream in needs)
        by_upstream[key].append(group)
    for key, groups in by_upstream.items():
        jobs = _pack(groups, points_per_job)
        size = min(max_array_size, MAX_FOLLOWING) if len(key) > 1 else max_array_size
        for start in range(0, len(jobs), size):
            chunk, previous = jobs[start : start + size], None
            for kind, upstream in key:
                previous = JobArray(kind, [[parts[kind] for parts in job] for job in chunk], upstream, previous)
                yield previous


def _targets_of(parts: _Parts, kind: str) -> list[Stage]:
    return parts[kind].targets if kind in parts else []


def _pack(groups: list[list[_Parts]], points_per_job: int) -> list[list[_Parts]]:
    """Return the points of each job: at most so many, or a group that has more, in their order."""
    jobs: list[list[_Parts]] = []
    for group in groups:
        if jobs and len(jobs[-1]) + len(group) <= points_per_job:
            jobs[-1].extend(group)
        else:
            jobs.append(list(group))
    return jobs


def _all_upstream(stage: Stage) -> Iterator[str]:
    for up in stage.upstream.values():
        yield up.identity
        yield from _all_upstream(up)


def split_parallelism(total: int | None, sizes: list[int]) -> list[int | None]:
    """Split `total` jobs that may run at once over job arrays in proportion to their sizes, at least one each."""
    if total is None:
        return [None] * len(sizes)
    exact = [total * size / sum(sizes) for size in sizes]
    split = [min(size, max(1, int(share))) for size, share in zip(sizes, exact, strict=True)]
    for i in sorted(range(len(sizes)), key=lambda i: split[i] - exact[i]):  # largest remainder first
        if sum(split) < total and split[i] < sizes[i]:
            split[i] += 1
    return list(split)
