"""Memory of steps of the 3B setups: at most nine tenths of the card, and on a card what the rehearsal says."""

from __future__ import annotations

from benchmarks.gpu_check.environment import gpu_of
from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting, rehearsed
from benchmarks.gpu_check.workloads import (
    GIB,
    examples_of,
    rehearsals,
    rehearsals_if_possible,
    request_of,
    steps_on_card,
)
from src.planning.fit import TARGET_FRACTION
from src.planning.gpus import find_gpu
from src.rehearsal.request import Result

REHEARSED_GPU = "h100"
STEPS = 3  # the optimizer's state is there from the second on
LONGEST = 2  # pairs as long as the limits allow, 8k tokens in UltraFeedback; gradients are there at the second
# Workload and overrides.
VARIANTS = {
    "3B TL;DR": ("3B TL;DR", ()),
    "3B TL;DR, checkpointing": ("3B TL;DR", ("engine.activation_checkpointing=true",)),
    "3B UF with an 8k-token pair": ("3B UF", ()),
}
WHY_PEAK = "nine tenths of the card: the rest is for fragmentation and other processes"
AS_REHEARSED = Limit(0.05, "the rehearsal decides what fits and which micro-batches are recomputed")
FRAGMENTS = Limit(3.0, "what the allocator holds and tensors do not is lost to the run")


def run(setting: Setting) -> list[Row]:
    gpu = gpu_of(setting) or find_gpu(REHEARSED_GPU)
    requests = [request_of(workload, gpu.name, *changes) for workload, changes in VARIANTS.values()]
    bound = Limit(TARGET_FRACTION * gpu.memory / GIB, WHY_PEAK)
    if not setting.on_card:
        return [
            rehearsed(f"{name}: peak on one {gpu.name}", result.peak / GIB, "GiB", bound, held(result))
            for name, result in zip(VARIANTS, rehearsals(requests), strict=True)
        ]
    results, why_not = rehearsals_if_possible(requests)
    rows = []
    for (name, (workload, changes)), request, result in zip(VARIANTS.items(), requests, results, strict=True):
        folder, examples = setting.out / "memory" / name.replace(" ", "_"), examples_of(request, LONGEST)
        step = steps_on_card(workload, gpu.name, folder, STEPS, *changes, examples=examples)
        rows.append(setting.row(f"{name}: peak", step.peak / GIB, "GiB", bound))
        fragments = (step.reserved - step.peak) / GIB
        rows.append(setting.row(f"{name}: reserved and not allocated", fragments, "GiB", FRAGMENTS))
        if result is None:
            rows.append(setting.row(f"{name}: not rehearsed here", 0, note=why_not))
            continue
        rows.append(rehearsed(f"{name}: peak", result.peak / GIB, "GiB", None, held(result)))
        difference = abs(step.peak / result.peak - 1)
        rows.append(setting.row(f"{name}: peak against the rehearsal", difference, "", AS_REHEARSED))
    return rows


def held(result: Result) -> str:
    """Return what the step holds, in words."""
    parts = [f"{name.replace('_', ' ')} {size / GIB:.1f}" for name, size in result.held.items()]
    budget = f"{result.token_budget:,} tokens a micro-batch" if result.token_budget else ""
    recomputed = f"{result.checkpointed_micro_batches} of {result.micro_batches} recomputed"
    return ", ".join(filter(None, [*parts, budget, recomputed]))
