"""The tokens of a micro-batch with trainer.max_tokens_per_micro_batch=null: on a GPU, as many as fit in memory.

Results depend on it by rounding only, because an example has the same weight in any micro-batch.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import Any

import torch

from src.data.examples import Example
from src.distributed import get_distributed
from src.errors import ConfigError
from src.hardware import release_accelerator
from src.model import lm_head
from src.model.packing import longest_first, pack
from src.training.engine import TrainingEngine

log = logging.getLogger(__name__)

CPU_TOKEN_BUDGET = 4096  # larger micro-batches exceed the caches and are no faster
_MULTIPLE = 1024  # budgets are rounded down to it, so that slightly different free memory gives the same budget
_USABLE_FRACTION = 0.8  # of the free memory; the rest is for fragmentation and temporary buffers of backward passes


def find_token_budget(engine: TrainingEngine, policy: Any, examples: Sequence[Example]) -> int:
    """Return the configured budget, else a constant on a CPU and what fits in memory on a GPU."""
    if engine.resources.max_tokens_per_micro_batch is not None:
        return engine.resources.max_tokens_per_micro_batch
    return measure_token_budget(engine, policy, examples) if engine.device.type == "cuda" else CPU_TOKEN_BUDGET


def max_token_budget(free: int, measure: Callable[[int], tuple[int, int]], longest: int) -> int:
    """Return the largest multiple of 1024 tokens whose activations fit into `free` bytes.

    measure: takes a number of tokens and returns (tokens tried, bytes they took), where about as many are tried.
    longest: tokens of the longest example. Raises ConfigError when that does not fit.
    """
    (few, small), (many, large) = measure(_MULTIPLE), measure(4 * _MULTIPLE)
    bytes_per_token = (large - small) / (many - few) if many > few and large > small else large / many
    budget = int(_USABLE_FRACTION * free / bytes_per_token) // _MULTIPLE * _MULTIPLE
    if budget < longest:
        raise ConfigError(
            f"trainer.max_tokens_per_micro_batch=null: an example of {longest} tokens does not fit into "
            f"{free / 2**30:.1f} GiB; try engine.activation_checkpointing=true, engine=zero3, or a smaller "
            "dataset.max_tokens"
        )
    return budget


def measure_token_budget(engine: TrainingEngine, policy: Any, examples: Sequence[Example]) -> int:
    """Measure activation memory with the real model; return the minimum over all ranks."""
    device = engine.device
    # Blocks that torch's allocator cached for an earlier model of this process are free, but the driver counts them as
    # used: without this the second training stage of a process would find no memory.
    release_accelerator()
    lengths = [example.length for example in examples]
    order = longest_first(lengths, range(len(examples)))

    def measure(tokens: int) -> tuple[int, int]:
        indices: list[int] = []
        while sum(lengths[i] for i in indices) < tokens and len(indices) < len(order):
            indices.append(order[len(indices)])
        before = torch.cuda.memory_allocated(device)
        with engine.micro_step(last=False):
            logps = policy(pack(examples, indices).to(device))  # keeps its activations alive
        taken = torch.cuda.memory_allocated(device) - before
        del logps
        return sum(lengths[i] for i in indices), taken

    shards = get_distributed().size if engine.zero else 1
    vocab_size = next(m for m in policy.modules() if isinstance(m, lm_head.Head)).out_features
    # Gradients and the two moments of Adam are allocated in the first step.
    reserved_bytes = sum(p.numel() for p in policy.parameters() if p.requires_grad) * (4 + 8 // shards)
    reserved_bytes += 3 * 4 * lm_head.TOKEN_CHUNK * vocab_size
    free = torch.cuda.mem_get_info(device)[0] - reserved_bytes
    budget = get_distributed().all_reduce_min(max_token_budget(free, measure, max(lengths)))
    log.info("micro-batches of %d tokens, measured with %.1f GiB of free memory", budget, free / 2**30)
    return budget
