"""Whether jobs of their own sample and evaluate what others have aligned: which takes fewer accelerator-hours."""

from __future__ import annotations

import math
from typing import NamedTuple

from launchers.slurm.options import OWN_JOB, SAME_JOB, SlurmOptions
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.planning.plan import Plan
from src.store.store import Store


class Choice(NamedTuple):
    """same_job or own_job, and why."""

    sampling: str
    reason: str


def choose_sampling(options: SlurmOptions, plan: Plan, forecast: Forecast) -> Choice:
    """Return where the points of a plan are sampled: where that takes fewer accelerator-hours by the estimate.

    A job that aligns holds all its GPUs while weights are read, and while the last batches are sampled; a job of its
    own holds one, and has to start first. Judging is not estimated.
    """
    if options.points_per_job > 1:
        return Choice(SAME_JOB, "in jobs of several points each samples its own")
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
    return Choice(OWN_JOB if own < same else SAME_JOB, reason)


def _gpus(number: int) -> str:
    return "1 GPU" if number == 1 else f"{number} GPUs"
