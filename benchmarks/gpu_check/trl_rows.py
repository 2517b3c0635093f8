"""Steps of TRL's DPOTrainer on the same pairs: with its defaults, without checkpointing, and with liger's fused loss.

Recorded, not checked: what others take for a step is what docs/performance.md compares with.
"""

from __future__ import annotations

import importlib.util
import statistics
import time
from itertools import pairwise
from typing import Any

import torch
from transformers import TrainerCallback

from benchmarks.gpu_check.environment import synchronize
from benchmarks.gpu_check.results import Row
from benchmarks.gpu_check.setting import NotHere, Setting
from benchmarks.gpu_check.shapes import SHAPES, llama, llama_of, pairs
from benchmarks.gpu_check.speed import REHEARSED_GPU
from benchmarks.gpu_check.training import stage_of
from benchmarks.gpu_check.workloads import WORKLOADS, examples_of, request_of
from benchmarks.trl_side import trl_trainer
from src.model.loading import load_template

STEPS = 3  # of which the first is a warm-up
VARIANTS: dict[str, dict[str, Any]] = {
    "default": {"gradient_checkpointing": True},
    "no checkpointing": {"gradient_checkpointing": False},
    "liger": {"gradient_checkpointing": True, "use_liger_kernel": True},
}


def run(setting: Setting) -> list[Row]:
    if importlib.util.find_spec("trl") is None:
        raise NotHere("trl is not installed: put its wheel and datasets' into --wheels")
    rows = []
    for workload in ("3B TL;DR", "3B UF") if setting.on_card else ("tiny",):
        for variant, options in VARIANTS.items():
            if variant == "liger" and (not setting.on_card or importlib.util.find_spec("liger_kernel") is None):
                continue  # its kernels run on cards only
            rows += measure(setting, workload, variant, options)
    return rows


def measure(setting: Setting, workload: str, variant: str, options: dict[str, Any]) -> list[Row]:
    """Return seconds of a step and peak memory; a variant that runs out of memory is a row that says so."""
    try:
        seconds, pairs_of_step, peak = steps(setting, workload, options)
    except torch.OutOfMemoryError as error:
        torch.cuda.empty_cache()
        return [setting.row(f"{workload}, {variant}: out of memory", 0, note=str(error)[:200])]
    name = f"{workload}, {variant}"
    rows = [setting.row(f"{name}: step", seconds, "s"), setting.row(f"{name}: pairs", pairs_of_step / seconds, "1/s")]
    return [*rows, setting.row(f"{name}: peak", peak, "GiB")] if setting.on_card else rows


def steps(setting: Setting, workload: str, options: dict[str, Any]) -> tuple[float, int, float]:
    """Train for some steps; return the median seconds of a step, its pairs, and the peak of memory in GiB."""
    if setting.on_card:
        count, micro_batch = 32, 4
        model = llama_of(WORKLOADS[workload].model, setting.device)
        drawn = examples_of(request_of(workload, REHEARSED_GPU))[1:]  # without the longest that the limits allow
        examples = drawn[: count * STEPS]
    else:
        count, micro_batch = 4, 2
        model, examples = llama("tiny", setting.device), pairs(count * STEPS, SHAPES["tiny"][-1], 30)
    job = {"micro_batch": micro_batch, "pairs": count, "device": setting.device.type, "precision": "bf16"}
    tokenizer = load_template(stage_of("align", "setup=mini_tldr", "method=dpo", "beta=0.1").inputs.model).tokenizer
    trainer = trl_trainer(job, model, tokenizer, examples, STEPS, **options)
    times: list[float] = []

    class Clock(TrainerCallback):
        def on_step_end(self, *_: Any, **__: Any) -> None:
            synchronize()
            times.append(time.perf_counter())

    trainer.add_callback(Clock())
    if setting.on_card:
        torch.cuda.reset_peak_memory_stats()
    trainer.train()
    peak = torch.cuda.max_memory_allocated() / 2**30 if setting.on_card else 0.0
    return statistics.median(b - a for a, b in pairwise(times)), count, peak
