"""Whether jobs of their own sample and evaluate what others have aligned: which takes fewer accelerator-hours."""

from __future__ import annotations

import math
from typing import NamedTuple

from launchers.slurm.options import OWN_JOB, SAME_JOB, SlurmOptions
from src.estimates.cost import Cost
from src.estimates.disk import bytes_text, disk_of, free_bytes
from src.estimates.forecast import Forecast
from src.planning.plan import Plan
from src.store.store import Store


class Choice(NamedTuple):
    """same_job or own_job, and why."""

    sampling: str
    reason: str


def choose_sampling(options: SlurmOptions, plan: Plan, forecast: Forecast, num_aligning: int) -> Choice:
    """Return where the points of a plan are sampled: where that takes fewer accelerator-hours by the estimate.

    A job that aligns holds all its GPUs while weights are read, and while the last batches are sampled; a job of its
    own holds one, and has to start first. Until then the model waits on disk, where all of a plan may not fit. Judging
    is not estimated. num_aligning: points that are aligned at once.
    """
    if options.points_per_job > 1:
        return Choice(SAME_JOB, "in jobs of several points each samples its own")
    if options.array_parallelism is not None:
        return Choice(SAME_JOB, "array_parallelism bounds the points that run at once only where one job computes each")
    align, sample = (options.kinds[kind].num_processes for kind in ("align", "sample"))
    if align <= sample:
        return Choice(SAME_JOB, f"a job that aligns has {_gpus(align)}")
    stages = [stage for identity, stage in plan.stages.items() if identity in plan.needed and stage.role == "generate"]
    if not stages:
        return Choice(SAME_JOB, "nothing is left to sample")
    forecast.rehearse("generate")
    cost = Cost(plan, Store(plan.points[0].output_dir), forecast)

    def hours(processes: int, starts_job: bool) -> float:
        usages = [cost.usage(stage, processes, starts_job) for stage in stages]
        return sum(usage.in_use + usage.waiting for usage in usages) / 3600 / len(stages)

    same, own = hours(align, starts_job=False), hours(sample, starts_job=True)
    if math.isnan(same + own):
        return Choice(SAME_JOB, "there is no estimate without engine.gpu=NAME or a finished run")
    reason = (
        f"a point takes {own:.3g} accelerator-hours in a job of {_gpus(sample)} that follows its alignment, {same:.3g} "
        f"in the job of {_gpus(align)} that aligns it"
    )
    if own < same and (too_much := _why_not_on_disk(plan, num_aligning)):
        return Choice(SAME_JOB, f"{reason}, but {too_much}")
    return Choice(OWN_JOB if own < same else SAME_JOB, reason)


def _why_not_on_disk(plan: Plan, num_aligning: int) -> str | None:
    """Return why models cannot wait for jobs that sample; None where they can, or where it changes nothing."""
    waiting, otherwise = disk_of(plan, plan.num_points_to_compute), disk_of(plan, num_aligning)
    free = free_bytes(Store(plan.points[0].output_dir))
    if waiting is None or otherwise is None or waiting.num_models == otherwise.num_models:
        return None
    if math.isnan(waiting.model_bytes) or waiting.model_bytes < free:
        return None
    return (
        f"{waiting.num_models} models that wait for one would take {bytes_text(waiting.model_bytes)} of disk, of which "
        f"{bytes_text(free)} are free"
    )


def _gpus(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"
