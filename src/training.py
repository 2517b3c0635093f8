"""The optimisation loop: an optimiser step is exactly `batch_size` examples, however they are packed."""

from __future__ import annotations

import contextlib
import logging
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState, PartialState

from src import checkpoints, interruption
from src.config import ConfigError, Optimisation, Point
from src.distributed import world
from src.failure import StageError
from src.logprobs import SequenceLogps
from src.pairs import Example, PackedBatch, pack, partition, share
from src.tracking import METRICS_FILE, Tracker

if TYPE_CHECKING:
    from torch import Tensor

    from src.store import Attempt

log = logging.getLogger(__name__)
# It reports every file of every checkpoint, and warns of the tied weights that safetensors stores once.
logging.getLogger("accelerate").setLevel(logging.ERROR)


@dataclass(frozen=True)
class StepSize:
    """What one optimiser step consists of, whatever its micro-batches."""

    examples: int
    response_tokens: int


# (batch, logps, tokens, step) -> (this micro-batch's share of the step's loss, sums over examples of what to log)
Objective = Callable[[PackedBatch, "Tensor", "Tensor", StepSize], tuple["Tensor", dict[str, "Tensor"]]]


def total_steps(examples: int, optimisation: Optimisation) -> int:
    """Whole batches in `epochs` passes, at least one, at most max_steps."""
    steps = max(1, math.floor(examples * optimisation.epochs / optimisation.batch_size))
    return min(steps, optimisation.max_steps or steps)


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


def make_accelerator(device: torch.device) -> Accelerator:
    """This process's accelerator. A warm worker meets several engines, and accelerate keeps the first as a singleton.

    Precision is the log-prob path's business, so that all that goes through it agrees.
    """
    AcceleratorState._reset_state()
    PartialState._reset_state()
    accelerator = Accelerator(cpu=device.type == "cpu")
    # It has been seen to go on alone where several processes were meant.
    assert accelerator.num_processes == world().size, f"{accelerator.num_processes} processes, not {world().size}"
    return accelerator


def train(
    model: Any,
    examples: Sequence[Example],
    objective: Objective,
    point: Point,
    kind: str,
    attempt: Attempt,
    tracker: Tracker,
) -> None:
    """Run all optimiser steps of the point's `sft` or `align` on `model`, in place, resuming from the attempt's newest
    checkpoint; in every process of the run, each of which computes its share of a step's examples.

    Losses are computed in float32; master weights are float32. Logs every step. Raises LeaseLost,
    Interrupted after saving, and StageError when a loss or gradient is not finite.
    """
    trainer = point.trainer
    optimisation, lr = (trainer.sft, trainer.sft.lr) if kind == "sft" else (trainer.align, point.lr)
    device = next(model.parameters()).device
    accelerator = make_accelerator(device)
    optimiser = torch.optim.AdamW(
        model.parameters(),
        lr=lr,
        betas=(optimisation.adam_betas[0], optimisation.adam_betas[1]),
        weight_decay=optimisation.weight_decay,
        fused=True,
    )
    here = world()
    policy, optimiser = accelerator.prepare(SequenceLogps(model, point.engine.precision), optimiser)
    metrics_file = attempt.out / METRICS_FILE
    state = checkpoints.resume(attempt.checkpoints, accelerator, metrics_file) or {"step": 0, "seconds": 0, "tokens": 0}
    attempt.spent_before, attempt.tokens = state["seconds"], state["tokens"]

    def save(step: int) -> None:
        if attempt.lease is None:
            return
        attempt.lease.check()
        now = {"seconds": attempt.seconds, "tokens": attempt.tokens}
        checkpoints.save(attempt.checkpoints, step, now, accelerator, metrics_file)

    total = total_steps(len(examples), optimisation)
    lengths = [e.length for e in examples]
    if optimisation.batch_size < here.size:
        raise ConfigError(
            f"trainer.{kind}.batch_size={optimisation.batch_size}: below the number of processes, {here.size}"
        )
    model.train()
    stopping = 0.0  # how many processes were asked to stop, known to all
    for step in range(state["step"], total):
        if stopping:
            save(step)
            here.tell()  # the others must not end, and take this one with them, before all is on disk
            raise interruption.Interrupted(f"{attempt.label} stopped at {step}/{total}: {interruption.requested()}")
        attempt.step(step, total, interruptible=False)
        started = time.perf_counter()
        chosen = batch_indices(step, len(examples), optimisation.batch_size, point.seed)
        size = StepSize(len(chosen), sum(len(r) for i in chosen for r in examples[i].responses))
        rate = lr * schedule(step, total, optimisation)
        for group in optimiser.param_groups:
            group["lr"] = rate

        sums: dict[str, Tensor] = {}
        own = share(lengths, chosen, here.rank, here.size)
        micro_batches = partition(lengths, own, trainer.tokens_per_batch)
        for number, indices in enumerate(micro_batches):
            batch = pack(examples, indices).to(device)
            # Gradients are summed over processes once a step, in the last backward pass, and come out as their mean.
            with contextlib.nullcontext() if number == len(micro_batches) - 1 else accelerator.no_sync(policy):
                logps, counts = policy(batch)
                loss, logged = objective(batch, logps, counts, size)
                accelerator.backward(loss * here.size if here.size > 1 else loss)
            for name, value in {"loss": loss, "tokens": torch.tensor(batch.tokens), **logged}.items():
                sums[name] = sums.get(name, 0.0) + value.detach().double()
        norm = float(accelerator.clip_grad_norm_(model.parameters(), optimisation.max_grad_norm))
        sums["stopping"] = torch.tensor(float(interruption.requested() is not None))
        everything = torch.stack([value.to(device, torch.float64) for value in sums.values()])
        values = dict(zip(sums, here.total(everything).tolist(), strict=True))
        stopping, tokens, loss_value = values.pop("stopping"), int(values.pop("tokens")), values.pop("loss")
        if not math.isfinite(loss_value + norm):
            raise StageError(f"diverged at step {step}: loss {loss_value:g}, gradient norm {norm:g}")
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)

        attempt.tokens += tokens
        means = {name: value / size.examples for name, value in values.items()}
        speed = tokens / (time.perf_counter() - started)
        tracker.log(
            step,
            {"loss": loss_value, **means, "lr": rate, "grad_norm": norm, "tokens_per_second": round(speed, 1)},
        )
        if (step + 1) % trainer.checkpoint_steps == 0 and step + 1 < total:
            save(step + 1)
    attempt.step(total, total)
