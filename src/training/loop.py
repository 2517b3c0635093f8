"""The training loop: an optimizer step covers exactly `batch_size` examples, however they are packed."""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from src.data.examples import Example
from src.distributed import get_distributed
from src.errors import ConfigError, StageError
from src.hardware import HeapTrimmer
from src.model.loading import numerics_of
from src.model.logprobs import SequenceLogps
from src.model.packing import MicroBatch, PackedBatch, distribute_examples, pack
from src.planning.identity import AlignInputs, SftInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt
from src.store.store import METRICS_FILE
from src.training.checkpoints import Checkpointer, Votes
from src.training.engine import TrainingEngine
from src.training.lr_schedule import lr_multiplier, total_steps
from src.training.token_budget import find_token_budget


@dataclass(frozen=True)
class GlobalBatch:
    """The size of one optimizer step over all ranks and micro-batches."""

    num_examples: int
    num_supervised_tokens: int


# (batch, logps, token counts, global batch) -> (the part of the step's loss that is this micro-batch's,
# values to log: sums over the examples of the micro-batch, by metric)
LossFn = Callable[[PackedBatch, Tensor, Tensor, GlobalBatch], tuple[Tensor, dict[str, Tensor]]]


def sft_loss(
    packed: PackedBatch, logps: Tensor, token_counts: Tensor, batch: GlobalBatch
) -> tuple[Tensor, dict[str, Tensor]]:
    """Token-mean cross-entropy: every response token of the step weighs the same, whichever micro-batch it is in."""
    return -logps.sum() / batch.num_supervised_tokens, {"supervised_tokens": token_counts.sum()}


def batch_indices(step: int, num_examples: int, batch_size: int, seed: int) -> list[int]:
    """Return the examples of a step: consecutive slices of one seeded permutation per epoch, across epoch ends."""
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, offset = divmod(step * batch_size + len(indices), num_examples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_examples, generator=generator).tolist()
        indices += order[offset : offset + batch_size - len(indices)]
    return indices


def train(
    model: Any,
    examples: Sequence[Example],
    loss_fn: LossFn,
    inputs: SftInputs | AlignInputs,
    resources: Resources,
    attempt: Attempt,
) -> Any:
    """Train `model` and return it, adapters merged; under ZeRO-3 ranks other than 0 get None.

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
        engine = TrainingEngine(resources, trainer, inputs.lora, inputs.seed)
        cleanup.enter_context(contextlib.closing(engine))
        policy = engine.prepare(SequenceLogps(engine.configure_model(model), numerics_of(inputs.model, resources)))
        total = total_steps(len(examples), trainer)
        end = max(1, round(inputs.stop_fraction * total)) if isinstance(inputs, AlignInputs) else total
        checkpointer = cleanup.enter_context(
            contextlib.closing(Checkpointer(engine, attempt, resources.checkpoint_minutes))
        )
        first = checkpointer.resume(end)
        lengths = [example.length for example in examples]
        budget = find_token_budget(engine, policy, examples)
        model.train()
        heap = HeapTrimmer()
        for step in range(first, end):
            attempt.step(step, end, interruptible=False)
            started = time.perf_counter()
            indices = batch_indices(step, len(examples), trainer.batch_size, inputs.seed)
            batch = GlobalBatch(len(indices), sum(examples[i].num_supervised_tokens for i in indices))
            lr = engine.set_lr(trainer.lr * lr_multiplier(step, total, trainer))
            micro_batches = distribute_examples(lengths, indices, budget, ranks.size)[ranks.rank]
            names, metric_sums = _accumulate_step(engine, policy, examples, micro_batches, loss_fn, batch)
            grad_norm = engine.step()
            heap.maybe_trim()
            num_local_tokens = sum(lengths[i] for m in micro_batches if not m.is_filler for i in m.indices)
            (loss, *totals), num_tokens, votes = _reduce_metrics(metric_sums, num_local_tokens, checkpointer.votes())
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                raise StageError(f"diverged at step {step}: loss {loss:g}, gradient norm {grad_norm:g}")
            attempt.tokens += num_tokens
            values = {"loss": loss, "grad_norm": float(grad_norm), "learning_rate": lr}
            values |= {name: total / batch.num_examples for name, total in zip(names, totals, strict=True)}
            values["tokens_per_second"] = round(num_tokens / (time.perf_counter() - started), 1)
            log_metrics(attempt, step, values)
            checkpointer.end_step(step + 1, end, votes)
        if end < total:
            # May be the final checkpoint: this point may never be promoted to the next rung.
            checkpointer.save(end, keep=1)
            checkpointer.wait()
        attempt.step(end, end)
        return engine.gather_model(model)


def _accumulate_step(
    engine: TrainingEngine,
    policy: Any,
    examples: Sequence[Example],
    micro_batches: Sequence[MicroBatch],
    loss_fn: LossFn,
    batch: GlobalBatch,
) -> tuple[list[str], Tensor]:
    """Accumulate the gradients of this rank's micro-batches.

    Returns the names of what is logged beside the loss, and (1 + names,) float64 sums, on the device.
    """
    names: list[str] = []
    metric_sums: Tensor | None = None
    for number, micro_batch in enumerate(micro_batches):
        packed = pack(examples, micro_batch.indices).to(engine.device)
        with engine.micro_step(last=number == len(micro_batches) - 1):
            logps, token_counts = policy(packed)
            loss, logged = loss_fn(packed, logps, token_counts, batch)
            engine.backward(0.0 * loss if micro_batch.is_filler else loss)
        if not micro_batch.is_filler:
            names = list(logged)
            values = torch.stack([loss, *logged.values()]).detach().double()
            metric_sums = values if metric_sums is None else metric_sums + values
    assert metric_sums is not None, "every rank has an example of every step"
    return names, metric_sums


def _reduce_metrics(metric_sums: Tensor, num_tokens: int, votes: Votes) -> tuple[list[float], int, Votes]:
    """Return, over all ranks: the sums, the tokens of the step, and the votes about its checkpoint.

    Besides the gradient norm this is the only device-to-host copy of a step, after all its kernels are enqueued.
    """
    local = torch.tensor([num_tokens, *votes], dtype=torch.float64)
    packed = torch.cat([metric_sums, local.to(metric_sums.device)])
    sums = get_distributed().all_reduce_sum(packed).tolist()
    num_sums = len(metric_sums)
    return sums[:num_sums], int(sums[num_sums]), Votes(*map(int, sums[num_sums + 1 :]))


def log_metrics(attempt: Attempt, step: int, values: dict[str, float]) -> None:
    """Append a line to metrics.jsonl, from which trackers are fed; ranks other than 0 write nothing."""
    if attempt.is_main_process:
        with (attempt.out / METRICS_FILE).open("a", encoding="utf-8") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")
