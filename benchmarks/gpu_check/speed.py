"""Time of one optimizer step of 128 pairs: measured on a card beside what the rehearsal says, or rehearsed alone."""

from __future__ import annotations

from pathlib import Path

import torch

from benchmarks.gpu_check.environment import gpu_of, product
from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting, rehearsed
from benchmarks.gpu_check.workloads import (
    WORKLOADS,
    Step,
    rehearsals,
    rehearsals_if_possible,
    request_of,
    steps_on_card,
)
from src.planning.gpus import Gpu, find_gpu
from src.rehearsal.request import Result

REHEARSED_GPU = "h100"
STEPS = 4
TOP_KERNELS = 15
VARIANTS = {
    "": (),
    ", checkpointing": ("engine.activation_checkpointing=true",),
    ", compiled": ("engine.compile=true",),
}
COMPILED = ("3B TL;DR",)  # compiling takes a minute
WHY = "the seconds that a step should take on an H100 (docs/performance.md), for the tokens it has"
TARGETS = {"3B TL;DR": (2.1, 59_500), "3B UF": (4.5, 100_000), "8B UF": (1.2, 11_200)}  # seconds, for so many tokens


def run(setting: Setting) -> list[Row]:
    gpu = gpu_of(setting) or find_gpu(REHEARSED_GPU)
    if not setting.on_card:
        requests = [request_of(workload, gpu.name) for workload in WORKLOADS]
        results = rehearsals(requests)
        return [
            row for name, result in zip(WORKLOADS, results, strict=True) for row in rehearsed_rows(name, gpu, result)
        ]
    ceiling = product(setting).value * 1e12
    results, _ = rehearsals_if_possible([request_of(name, gpu.name, on_card=True) for name in WORKLOADS])
    rows: list[Row] = []
    for workload, result in zip(WORKLOADS, results, strict=True):
        for variant, changes in VARIANTS.items():
            if variant == ", compiled" and workload not in COMPILED:
                continue
            folder = setting.out / "speed" / f"{workload}{variant}".replace(" ", "_")
            step = steps_on_card(workload, gpu.name, folder, STEPS, *changes)
            rows += measured_rows(
                setting, f"{label(workload)}{variant}", step, None if variant else result, gpu, ceiling
            )
    return [*rows, *kernel_rows(setting, gpu)]


def label(workload: str) -> str:
    layers = WORKLOADS[workload].layers_on_card
    return f"{workload}, {layers} layers" if layers else workload


def rehearsed_rows(name: str, gpu: Gpu, result: Result) -> list[Row]:
    """Return the device's seconds of a step, the host's, the floor, and the kernels."""
    ranks = WORKLOADS[name].ranks
    where = f"one rank of {ranks} {gpu.name}" if ranks > 1 else f"one {gpu.name}"
    classes = sorted(result.work.items(), key=lambda item: -item[1].seconds)
    note = ", ".join(f"{kind} {work.seconds:.2f}" for kind, work in classes)
    if "communication" in result.work:
        note += f" of which {result.exposed_exchange_seconds:.2f} overlap nothing"
    seconds, tokens = TARGETS[name]
    limit = Limit(seconds * result.tokens / tokens, WHY)
    kernels = sum(work.kernels for work in result.work.values())
    return [
        rehearsed(f"{name}: device time of a step on {where}", result.seconds, "s", limit, note),
        rehearsed(f"{name}: host time of a step", result.host_seconds, "s", None, f"{kernels:.0f} kernels launched"),
        rehearsed(f"{name}: floor of a step", result.floor_seconds, "s", None, "products alone, at the ceiling"),
    ]


def measured_rows(
    setting: Setting, name: str, step: Step, result: Result | None, gpu: Gpu, ceiling: float
) -> list[Row]:
    """Return seconds and tokens a second of a step; with its rehearsal also MFU and the difference to it."""
    rows = [
        setting.row(f"{name}: step", step.seconds, "s"),
        setting.row(f"{name}: tokens", step.tokens / step.seconds, "1/s"),
    ]
    if result is None:
        return rows
    mfu = result.floor_seconds * gpu.bf16_peak / ceiling / step.seconds
    expected = max(result.seconds, result.host_seconds)
    return [
        *rows,
        setting.row(f"{name}: model FLOPs utilization", 100 * mfu, "%", None, "of the product measured in this run"),
        rehearsed(f"{name}: step", expected, "s"),
        setting.row(f"{name}: step over the rehearsed one", step.seconds / expected, "", None, "explain more than 1.1"),
    ]


def kernel_rows(setting: Setting, gpu: Gpu) -> list[Row]:
    """Return the kernels that take longest in two steps of 3B TL;DR; the whole table goes to profile.txt."""
    activities = [torch.profiler.ProfilerActivity.CUDA]
    with torch.profiler.profile(activities=activities) as profile:
        steps_on_card("3B TL;DR", gpu.name, setting.out / "speed" / "profiled", 2)
    averages = profile.key_averages()
    table: str = averages.table(sort_by="self_cuda_time_total", row_limit=60)
    Path(setting.out / "profile.txt").write_text(table, encoding="utf-8")
    longest = sorted(averages, key=lambda event: -event.self_device_time_total)[:TOP_KERNELS]
    return [
        setting.row(f"kernel {event.key[:80]}", event.self_device_time_total / 1e6, "s", None, f"{event.count} times")
        for event in longest
    ]
