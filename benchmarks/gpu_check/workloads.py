"""Steps of the paper's setups: on a card with random weights and tokens, and the same steps rehearsed."""

from __future__ import annotations

import random
import statistics
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from benchmarks.gpu_check.environment import synchronize
from benchmarks.gpu_check.shapes import llama_of
from benchmarks.gpu_check.training import stage_of, train_steps
from src.data.examples import Example
from src.errors import ConfigError
from src.estimates.load import load_of
from src.hardware import release_accelerator
from src.planning.stage import Stage
from src.rehearsal.request import Request, Result, rehearse_all
from src.training import loop

GIB = 2**30


@dataclass(frozen=True)
class Workload:
    """Alignment of a setup. ranks: of the rehearsal. layers: of a model that is cut down to fit on one card."""

    setup: str
    model: str
    ranks: int = 1
    layers_on_card: int | None = None


WORKLOADS = {
    "3B TL;DR": Workload("llama32_3b_tldr", "llama32_3b"),
    "3B UF": Workload("llama32_3b_uf", "llama32_3b"),
    "8B UF": Workload("llama31_8b_uf", "llama31_8b", ranks=8, layers_on_card=8),
}


@dataclass(frozen=True)
class Step:
    """An optimizer step of a run on a card: the median of those after the first, and the highest peak."""

    seconds: float
    tokens: int
    peak: int  # bytes that tensors held
    reserved: int  # bytes that torch's allocator held


def align_stage(workload: str, gpu: str, *overrides: str) -> Stage:
    """Return the alignment of a setup with its own defaults, planned for a card of conf/gpus.yaml."""
    setup = f"setup={WORKLOADS[workload].setup}"
    return stage_of("align", setup, "method=dpo", "beta=0.1", "lr=1e-6", f"engine.gpu={gpu}", *overrides)


def request_of(workload: str, gpu: str, *overrides: str, on_card: bool = False) -> Request:
    """Return the rehearsal of one step; on_card: of what `steps_on_card` runs, which is one process."""
    shape = WORKLOADS[workload]
    load = load_of(align_stage(workload, gpu, *overrides), 1 if on_card else shape.ranks)
    assert load is not None and load.request is not None, f"{workload} cannot be rehearsed for {gpu}"
    request = load.request
    if on_card and shape.layers_on_card:
        request = replace(request, config=request.config | {"num_hidden_layers": shape.layers_on_card}, layers=())
    return request


def rehearsals(requests: Sequence[Request]) -> list[Result]:
    """Return the results of all requests. Raises RuntimeError with the first error that a rehearsal found."""
    results = rehearse_all(requests)
    for result in results:
        if result.error is not None:
            raise RuntimeError(result.error)
    return results


def rehearsals_if_possible(requests: Sequence[Request]) -> tuple[list[Result | None], str]:
    """Return the results beside a card; where they cannot be made (no compiler), None for each, and why."""
    try:
        return [*rehearsals(requests)], ""
    except ConfigError as error:
        return [None] * len(requests), str(error)


def examples_of(request: Request, num_longest: int = 0) -> list[Example]:
    """Return examples of the request's lengths with random tokens, and so many of its longest one."""
    rng, vocabulary = random.Random(0), request.config["vocab_size"]

    def tokens(count: int) -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(count))

    lengths = (*request.examples, *[request.longest] * num_longest)
    return [Example(tokens(prompt), tuple(map(tokens, responses))) for prompt, *responses in lengths]


def steps_on_card(
    workload: str, gpu: str, folder: Path, count: int, *overrides: str, examples: Sequence[Example] | None = None
) -> Step:
    """Take optimizer steps of a setup on this card, each on all examples: by default those of the rehearsal."""
    shape, device = WORKLOADS[workload], torch.device("cuda")
    examples = examples or examples_of(request_of(workload, gpu, *overrides, on_card=True))
    whole_epochs = (f"trainer.align.batch_size={len(examples)}", f"trainer.align.epochs={count}")
    stage = align_stage(workload, gpu, *overrides, *whole_epochs, f"trainer.align.max_steps={count}")
    model = llama_of(shape.model, device, shape.layers_on_card)
    references = torch.full((len(examples), 2), -100.0)
    with measured_steps() as steps:
        train_steps(model, examples, stage, references, folder)
    del model
    release_accelerator()
    seconds, peaks, reserved = zip(*steps[1:], strict=True)
    tokens = sum(example.length for example in examples)
    return Step(statistics.median(seconds), tokens, max(peaks), max(reserved))


@contextmanager
def measured_steps() -> Iterator[list[tuple[float, int, int]]]:
    """Collect (seconds, peak bytes of tensors, peak bytes of the allocator) of every step of the training loop."""
    steps: list[tuple[float, int, int]] = []
    log_metrics, started = loop.log_metrics, time.perf_counter()

    def note(*arguments: Any) -> None:
        nonlocal started
        synchronize()
        now = time.perf_counter()
        steps.append((now - started, torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()))
        torch.cuda.reset_peak_memory_stats()
        log_metrics(*arguments)
        started = time.perf_counter()

    with mock.patch.object(loop, "log_metrics", note):
        yield steps
