"""How many tokens a micro-batch has, and of how many its activations are computed again in the backward pass.

On a GPU both follow from the memory of forward and backward passes, measured with the model that is trained. Results
depend on neither, but for the rounding of sums, because an example has the same weight in any micro-batch, and
recomputed activations are the same.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch.distributed.tensor import DTensor

from src.data.examples import Example
from src.distributed import get_distributed
from src.errors import ConfigError
from src.hardware import release_accelerator
from src.model.packing import pack
from src.planning.fit import BUDGET_MULTIPLE, MAX_BUDGET, TARGET_FRACTION
from src.training.engine import TrainingEngine

log = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 4096  # larger micro-batches exceed the caches and are no faster
# With fewer tokens a micro-batch, reading all weights and adding to all gradients takes longer than recomputing
# activations (by a count of bytes and FLOPs for 3B parameters on an H100).
MIN_TOKENS_SAVED = 2048
_FEW, _MANY = 1024, 4096  # tokens of the passes that are measured


@dataclass(frozen=True)
class TokenBudget:
    """tokens: of a micro-batch; a longer example is one by itself.

    max_tokens_saved: activations of larger micro-batches are recomputed, of others saved; None: as the engine is
    configured.
    """

    tokens: int
    max_tokens_saved: int | None = None

    def recomputes(self, num_tokens: int) -> bool | None:
        """Return whether activations of a micro-batch of this size are recomputed; None: as configured."""
        return None if self.max_tokens_saved is None else num_tokens > self.max_tokens_saved


class Pass(NamedTuple):
    """Bytes of a forward and backward pass, where gradients are already there; the largest of all ranks."""

    num_tokens: int
    before: int
    peak: int


# (number of tokens, whether activations are recomputed) -> the pass of about as many tokens
Measure = Callable[[int, bool], Pass]


def find_token_budget(engine: TrainingEngine, examples: Sequence[Example]) -> TokenBudget:
    """Return the budget of a run; on a GPU measure what fits. Every rank calls this and gets the same.

    Raises ConfigError, on all ranks, when not even the longest example fits.
    """
    configured, checkpointing = engine.resources.max_tokens_per_micro_batch, engine.resources.activation_checkpointing
    if engine.device.type != "cuda" or (configured is not None and checkpointing != "auto"):
        return TokenBudget(configured or CPU_TOKEN_BUDGET)
    # Blocks that torch's allocator cached for an earlier model of this process are free, but the driver counts them as
    # used: without this the second training stage of a process would find no memory.
    release_accelerator()
    longest = max(examples, key=lambda example: example.length)

    def measure(num_tokens: int, recompute: bool) -> Pass:
        return _measure(engine, resized(longest, num_tokens), recompute)

    limit = _memory_limit(engine)
    budget = choose_token_budget(measure, limit, longest.length, configured, checkpointing)
    release_accelerator()
    log.info("micro-batches of %s, measured with %.1f GiB of memory", budget, limit / 2**30)
    return budget


def choose_token_budget(
    measure: Measure, limit: int, longest: int, configured: int | None, checkpointing: bool | str
) -> TokenBudget:
    """Return the budget of which every micro-batch peaks at no more than `limit` bytes.

    longest: tokens of the longest example. configured, checkpointing: trainer.max_tokens_per_micro_batch and
    engine.activation_checkpointing; with `auto` passes with recomputed activations are measured only if they are
    needed. Raises ConfigError when a micro-batch of `longest` or `configured` tokens does not fit.
    """
    needed = max(longest, configured or 0)
    saved = 0 if checkpointing is True else max_tokens(measure, limit, recompute=False)
    recomputed = 0
    if checkpointing is True or (checkpointing == "auto" and saved < max(needed, MIN_TOKENS_SAVED)):
        recomputed = max_tokens(measure, limit, recompute=True)
    if needed > max(saved, recomputed):
        raise ConfigError(
            _too_large(
                f"an example of {needed} tokens" if needed == longest else f"a micro-batch of {needed} tokens",
                f", only {max(saved, recomputed)} tokens do, in {limit / 2**30:.1f} GiB",
                checkpointing,
            )
        )
    num_tokens = saved if saved >= MIN_TOKENS_SAVED or not recomputed else recomputed
    rounded = min(num_tokens, MAX_BUDGET) // BUDGET_MULTIPLE * BUDGET_MULTIPLE
    return TokenBudget(configured or rounded or longest, saved if checkpointing == "auto" else None)


def max_tokens(measure: Measure, limit: int, recompute: bool) -> int:
    """Return the number of tokens whose pass peaks at `limit` bytes, by a line through two measured passes.

    What a pass takes besides activations (blocks of logits, gathered weights) is the line's value at no tokens.
    """
    few = measure(_FEW, recompute)
    if few.peak > limit:
        return 0
    # The memory of a pass grows no faster than its tokens, so that so many certainly fit.
    certain = few.num_tokens * (limit - few.before) // max(1, few.peak - few.before)
    if certain < 1.1 * few.num_tokens:
        return certain
    many = measure(min(_MANY, certain), recompute)
    bytes_per_token = max(1.0, (many.peak - few.peak) / (many.num_tokens - few.num_tokens))
    return int(few.num_tokens + (limit - few.peak) / bytes_per_token)


def _too_large(what: str, why: str, checkpointing: bool | str) -> str:
    remedies = ["engine=fsdp with more processes", "a smaller dataset.max_tokens"]
    if checkpointing is False:
        remedies.insert(0, "engine.activation_checkpointing=auto")
    return f"{what} does not fit into the memory of the GPU{why}: use {' or '.join(remedies)}"


def resized(example: Example, num_tokens: int) -> list[Example]:
    """Return examples shaped like this one, cut or repeated, with about `num_tokens` tokens in all."""
    copies = max(1, round(num_tokens / example.length))
    share = min(1.0, num_tokens / (copies * example.length))
    prompt, *responses = (ids[: max(1, round(share * len(ids)))] for ids in (example.prompt, *example.responses))
    return [Example(prompt, tuple(responses))] * copies


def _memory_limit(engine: TrainingEngine) -> int:
    """Return the bytes that torch may allocate at the peak of a pass, the smallest number of all ranks.

    Adam's moments are allocated in the first step, after which passes have to fit beside them. DeepSpeed allocates its
    own when it starts. Gradients are there when a pass is measured.
    """
    free, total = torch.cuda.mem_get_info(engine.device)
    of_others = total - free - torch.cuda.memory_allocated(engine.device)
    moments = 0
    if not engine.resources.zero_stage and not engine.optimizer.state:
        trained = (p for p in engine.policy.parameters() if p.requires_grad)
        shards = (p.to_local() if isinstance(p, DTensor) else p for p in trained)
        moments = sum(2 * shard.numel() * shard.element_size() for shard in shards)
    return get_distributed().all_reduce_min(int(TARGET_FRACTION * total) - of_others - moments)


def _measure(engine: TrainingEngine, examples: Sequence[Example], recompute: bool) -> Pass:
    """Compute two micro-batches of these examples whose gradients are zeros; return the bytes of the second.

    They are like fillers at the beginning of a step, so that DeepSpeed, which keeps sums of gradients to itself, adds
    zeros to them; it would apply them in a last micro-batch of a step. All others exchange gradients there. Raises
    ConfigError on all ranks when one of them runs out of memory.
    """
    if engine.resources.activation_checkpointing == "auto":
        engine.checkpoint_activations(recompute)
    batch = pack(examples, range(len(examples))).to(engine.device)
    num_tokens, before = batch.input_ids.numel(), 0
    for last in (False, not engine.resources.zero_stage):
        torch.cuda.reset_peak_memory_stats(engine.device)
        before = torch.cuda.memory_allocated(engine.device)
        fits = 1
        try:
            with engine.micro_step(last):
                engine.backward(0.0 * engine.policy(batch)[0].sum())
        except torch.OutOfMemoryError:
            fits = 0
        # Agreed on after every pass, or the other ranks would wait for this one in their next exchange with it. NCCL
        # lets a process come here although its GPU waits in one of this pass. That never ends: the GPU is left alone.
        if not get_distributed().all_reduce_min(fits):
            what = f"a micro-batch of {num_tokens} tokens"
            raise ConfigError(_too_large(what, "", engine.resources.activation_checkpointing))
    peak = torch.cuda.max_memory_allocated(engine.device)
    if not engine.resources.zero_stage:
        engine.optimizer.zero_grad(set_to_none=True)
    return Pass(num_tokens, *(-get_distributed().all_reduce_min(-value) for value in (before, peak)))
