"""The optimisation loop: an optimiser step is exactly `batch_size` examples, however they are packed."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from src import budget as token_budget
from src import checkpoints, interruption
from src.config import ConfigError, Optimisation, Point
from src.distributed import world
from src.engine import TrainingEngine
from src.failure import StageError
from src.logprobs import SequenceLogps
from src.machine import FreedMemory
from src.models import compute_of, device_of
from src.pairs import Example, PackedBatch, pack, split_step
from src.tracking import METRICS_FILE, Tracker

if TYPE_CHECKING:
    from torch import Tensor

    from src.store import Attempt


@dataclass(frozen=True)
class StepSize:
    """What one optimiser step consists of, whatever its micro-batches."""

    examples: int
    response_tokens: int


# (batch, logps, tokens, step) -> (this micro-batch's share of the step's loss, sums over examples of what to log)
Objective = Callable[[PackedBatch, "Tensor", "Tensor", StepSize], tuple["Tensor", dict[str, "Tensor"]]]


def optimisation_of(point: Point, kind: str) -> tuple[Optimisation, float]:
    """How `sft` or `align` is optimised, and its peak learning rate: alignment's is the point's."""
    return (point.trainer.sft, point.trainer.sft.lr) if kind == "sft" else (point.trainer.align, point.lr)


def total_steps(examples: int, optimisation: Optimisation) -> int:
    """Whole batches in `epochs` passes, at least one, at most max_steps."""
    steps = max(1, math.floor(examples * optimisation.epochs / optimisation.batch_size))
    return min(steps, optimisation.max_steps or steps)


def stop_step(total: int, stop: float) -> int:
    """The step before which training stops: that share of all steps, rounded, at least one."""
    return max(1, round(stop * total))


def schedule(step: int, total: int, optimisation: Optimisation) -> float:
    """Share of the peak rate at step 0 .. total - 1: linear warm-up over warmup_ratio of them, then decay to 0."""
    warmup = math.ceil(optimisation.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    left = (total - step) / max(1, total - warmup)
    if optimisation.schedule == "cosine":
        return 0.5 * (1 - math.cos(math.pi * left))
    return 1.0 if optimisation.schedule == "constant" else left


def batch_indices(step: int, examples: int, batch_size: int, seed: int) -> list[int]:
    """The examples of a step: consecutive slices of one seeded permutation per epoch, running on over epochs."""
    indices: list[int] = []
    position = step * batch_size
    while len(indices) < batch_size:
        epoch, offset = divmod(position, examples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(examples, generator=generator).tolist()
        taken = order[offset : offset + batch_size - len(indices)]
        indices += taken
        position += len(taken)
    return indices


def train(
    engine: TrainingEngine,
    model: Any,
    examples: Sequence[Example],
    objective: Objective,
    point: Point,
    kind: str,
    attempt: Attempt,
    tracker: Tracker,
) -> None:
    """Run the optimiser steps of the point's `sft` or `align` on `model`, in place, resuming from the attempt's newest
    checkpoint; in every process of the run, each of which computes its share of a step's examples. Alignment that is to
    stop early leaves a checkpoint there.

    Losses are computed in float32. Logs every step. Raises LeaseLost, Interrupted after saving, and StageError when a
    loss or gradient is not finite.
    """
    trainer, here = point.trainer, world()
    optimisation, lr = optimisation_of(point, kind)
    if optimisation.batch_size < here.size:
        raise ConfigError(
            f"trainer.{kind}.batch_size={optimisation.batch_size}: below the number of processes, {here.size}"
        )
    compute = compute_of(point)
    device = device_of(point.engine)
    policy, optimiser = engine.prepare(
        SequenceLogps(model, compute),
        torch.optim.AdamW(
            [p for p in model.parameters() if p.requires_grad],
            lr=lr,
            betas=(optimisation.adam_betas[0], optimisation.adam_betas[1]),
            weight_decay=optimisation.weight_decay,
            fused=True,
        ),
    )
    total = total_steps(len(examples), optimisation)
    end = stop_step(total, point.trainer.align.stop) if kind == "align" else total
    metrics_file = attempt.out / METRICS_FILE
    state = checkpoints.resume(attempt.checkpoints, engine, metrics_file, end)
    state = state or {"step": 0, "seconds": 0, "tokens": 0}
    attempt.spent_before, attempt.tokens = state["seconds"], state["tokens"]

    def save(step: int, keep: int = checkpoints.KEEP) -> None:
        if attempt.lease is not None:
            attempt.lease.check()
        now = {"seconds": attempt.seconds, "tokens": attempt.tokens}
        checkpoints.save(attempt.checkpoints, step, now, engine, metrics_file, keep)

    lengths = [e.length for e in examples]
    budget = trainer.tokens_per_batch or (
        token_budget.on_gpu(engine, policy, examples, device) if device.type == "cuda" else token_budget.ON_CPU
    )
    model.train()
    freed = FreedMemory()
    stopping = 0.0  # how many processes were asked to stop, known to all
    for step in range(state["step"], end):
        if stopping:
            save(step)
            raise interruption.Interrupted(f"{attempt.label} stopped at {step}/{end}: {interruption.requested()}")
        attempt.step(step, end, interruptible=False)
        started = time.perf_counter()
        chosen = batch_indices(step, len(examples), optimisation.batch_size, point.seed)
        size = StepSize(len(chosen), sum(examples[i].learned for i in chosen))
        rate = lr * schedule(step, total, optimisation)
        for group in optimiser.param_groups:
            group["lr"] = rate

        names: tuple[str, ...] = ()
        sums: Tensor | None = None  # of this process's micro-batches, float64, on the device until the step is over
        micro_batches = split_step(lengths, chosen, budget, here.size)[here.rank]
        for number, micro_batch in enumerate(micro_batches):
            last = number == len(micro_batches) - 1
            batch = pack(examples, micro_batch.indices).to(device)
            with engine.micro_step(last):
                logps, counts = policy(batch)
                loss, logged = objective(batch, logps, counts, size)
                if not micro_batch.counts:
                    loss = 0.0 * loss
                engine.backward(loss)
            if micro_batch.counts:
                names = ("loss", *logged)
                values = torch.stack([loss, *logged.values()]).detach().double()
                sums = values if sums is None else sums + values
        norm = engine.step()
        freed.give_back()
        assert sums is not None
        # Everything that is logged crosses to the CPU once a step, after all work of the step is queued.
        seen = sum(lengths[i] for m in micro_batches if m.counts for i in m.indices)
        own = torch.tensor([seen, interruption.requested() is not None])
        everything = torch.cat([sums, own.to(device, torch.float64)])
        *totals, tokens, stopping = here.total(everything).tolist()
        loss_value, norm_value = totals[0], float(norm)
        if not math.isfinite(loss_value + norm_value):
            raise StageError(f"diverged at step {step}: loss {loss_value:g}, gradient norm {norm_value:g}")

        attempt.tokens += int(tokens)
        means = {name: value / size.examples for name, value in zip(names[1:], totals[1:], strict=True)}
        speed = tokens / (time.perf_counter() - started)
        tracker.log(
            step,
            {"loss": loss_value, **means, "lr": rate, "grad_norm": norm_value, "tokens_per_second": round(speed, 1)},
        )
        if (step + 1) % trainer.checkpoint_steps == 0 and step + 1 < end:
            save(step + 1)
    if end < total:
        save(end, keep=1)  # for ever, perhaps
    attempt.step(end, end)
