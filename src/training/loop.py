"""The training loop: an optimizer step covers exactly `batch_size` examples, however they are packed."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor

from src.data.examples import Example
from src.distributed import get_distributed
from src.errors import ConfigError, StageError
from src.hardware import HeapTrimmer, release_accelerator
from src.model.adapters import Adapter
from src.model.loading import numerics_of
from src.model.packing import PackedBatch
from src.planning.identity import AlignInputs, SftInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt
from src.store.store import METRICS_FILE
from src.training.batches import GlobalBatch, StepBatch, StepPlanner, prefetch
from src.training.checkpoints import Checkpointer, Votes
from src.training.engine import ModelLoader, TrainingEngine
from src.training.lr_schedule import lr_multiplier, total_steps
from src.training.strategies import make_engine
from src.training.token_budget import find_token_budget

# (batch, logps, token counts, global batch) -> (the part of the step's loss that is this micro-batch's,
# values to log: sums over the examples of the micro-batch, by metric)
LossFn = Callable[[PackedBatch, Tensor, Tensor, GlobalBatch], tuple[Tensor, dict[str, Tensor]]]


class Trained(NamedTuple):
    """A trained model, and its adapters where these are published instead of it."""

    model: Any  # float32, adapters merged, with the values that are published
    adapter: Adapter | None


def sft_loss(
    packed: PackedBatch, logps: Tensor, token_counts: Tensor, batch: GlobalBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token-mean cross-entropy: every response token of the step weighs the same, whichever micro-batch it is in."""
    return -logps.sum() / batch.num_supervised_tokens, {"supervised_tokens": token_counts.sum()}


def train(
    load: ModelLoader,
    examples: Sequence[Example],
    loss_fn: LossFn,
    inputs: SftInputs | AlignInputs,
    resources: Resources,
    attempt: Attempt,
) -> Trained:
    """Train the model that `load` returns and return it as it is published; ranks other than 0 may get None.

    Resumes from the attempt's newest checkpoint; every rank of the run calls this. A run that stops early
    (`stop_fraction`) leaves a checkpoint for longer ones. Raises LeaseLost; Interrupted after saving a checkpoint;
    ConfigError when there are more ranks than examples in a step; and StageError when a loss or gradient is not finite.
    """
    trainer, ranks = inputs.trainer, get_distributed()
    if trainer.batch_size < ranks.size:
        raise ConfigError(
            f"trainer.{inputs.kind}.batch_size={trainer.batch_size}: below the number of processes, {ranks.size}"
        )
    with contextlib.ExitStack() as cleanup:
        engine = cleanup.enter_context(contextlib.closing(make_engine(resources, trainer, inputs.lora, inputs.seed)))
        engine.prepare(load, numerics_of(inputs.model, resources))
        if isinstance(inputs, AlignInputs):
            engine.save_dtype = getattr(torch, inputs.save_dtype)
        total = total_steps(len(examples), trainer)
        end = max(1, round(inputs.stop_fraction * total)) if isinstance(inputs, AlignInputs) else total
        is_validated = isinstance(inputs, AlignInputs) or inputs.data.sft_validation_size != 0
        checkpointer = Checkpointer(engine, attempt, resources.checkpoint_minutes, is_validated and end == total)
        cleanup.enter_context(contextlib.closing(checkpointer))
        first = checkpointer.resume(end)
        budget = find_token_budget(engine, examples)
        planner = StepPlanner(examples, trainer.batch_size, inputs.seed, budget, engine.device)
        batches = cleanup.enter_context(contextlib.closing(prefetch(planner.prepare, range(first, end), engine.device)))
        heap = HeapTrimmer()
        started = time.perf_counter()
        for step, batch in enumerate(batches, first):
            attempt.step(step, end, interruptible=False)
            lr = engine.set_lr(trainer.lr * lr_multiplier(step, total, trainer))
            names, metric_sums = _accumulate_step(engine, batch, loss_fn)
            norm = engine.step()
            heap.maybe_trim()
            (loss, *totals), grad_norm, num_tokens, votes = _reduce_metrics(
                metric_sums, norm, batch.num_tokens, checkpointer.votes(is_last=step + 1 == end)
            )
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise StageError(f"diverged at step {step}: loss {loss:g}, gradient norm {grad_norm:g}")
            attempt.tokens += num_tokens
            values = {"loss": loss, "grad_norm": grad_norm, "learning_rate": lr}
            values |= {name: total / batch.size.num_examples for name, total in zip(names, totals, strict=True)}
            values["tokens_per_second"] = round(num_tokens / (time.perf_counter() - started), 1)
            log_metrics(attempt, step, values)
            checkpointer.end_step(step + 1, end, votes)
            started = time.perf_counter()
        if end < total:
            # May be the final checkpoint: this point may never be promoted to the next rung.
            checkpointer.save(end, keep=1)
            checkpointer.wait()
        attempt.step(end, end)
        model = engine.gather_model()
        trained = Trained(model, engine.adapter)
    release_accelerator()  # what validation and the next stage need: the engine holds nothing any more
    return trained


def _accumulate_step(engine: TrainingEngine, batch: StepBatch, loss_fn: LossFn) -> tuple[list[str], Tensor]:
    """Accumulate the gradients of this rank's micro-batches.

    Returns the names of what is logged beside the loss, and (1 + names,) float64 sums, on the device.
    """
    names: list[str] = []
    metric_sums: Tensor | None = None
    for micro_batch in batch.micro_batches:
        if micro_batch.recompute is not None:
            engine.checkpoint_activations(micro_batch.recompute)
        with engine.micro_step(last=micro_batch is batch.micro_batches[-1]):
            logps, token_counts = engine.policy(micro_batch.packed)
            loss, logged = loss_fn(micro_batch.packed, logps, token_counts, batch.size)
            engine.backward(0.0 * loss if micro_batch.is_filler else loss)
        if not micro_batch.is_filler:
            names = list(logged)
            values = torch.stack([loss, *logged.values()]).detach().double()
            metric_sums = values if metric_sums is None else metric_sums + values
    assert metric_sums is not None, "every rank has an example of every step"
    return names, metric_sums


def _reduce_metrics(
    metric_sums: Tensor, grad_norm: Tensor, num_tokens: int, votes: Votes
) -> tuple[list[float], float, int, Votes]:
    """Return, over all ranks: the sums, the gradient norm, the tokens of the step, and the votes on its checkpoint.

    This is the only device-to-host copy of a step, and the only time that the host waits for the device, but for a step
    whose state is saved.
    """
    device, float64 = metric_sums.device, torch.float64
    local = torch.tensor([num_tokens, *votes], dtype=float64).to(device, non_blocking=True)
    sums = get_distributed().all_reduce_sum(torch.cat([metric_sums, local]))
    norm = grad_norm.detach().to(device, float64, non_blocking=True).reshape(1)
    values = torch.cat([sums, norm]).tolist()
    num_sums = len(metric_sums)
    return values[:num_sums], values[-1], int(values[num_sums]), Votes(*map(int, values[num_sums + 1 : -1]))


def log_metrics(attempt: Attempt, step: int, values: dict[str, float]) -> None:
    """Append a line to metrics.jsonl, from which trackers are fed; ranks other than 0 write nothing."""
    if attempt.is_main_process:
        with (attempt.out / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
