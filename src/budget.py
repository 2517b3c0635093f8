"""How many tokens a micro-batch may have (trainer.tokens_per_batch=null): in training on a GPU, as many as fit into its
free memory.

Results do not depend on it beyond rounding: every example keeps its weight however it is packed.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import torch

from src import head
from src.config import ConfigError
from src.distributed import world
from src.machine import release_accelerator
from src.pairs import Example, pack

if TYPE_CHECKING:
    from src.engine import TrainingEngine

log = logging.getLogger(__name__)

ON_CPU = 4096  # caches are small there, and nothing is gained by more
SCORING = 16384  # without gradients, anywhere: a layer's activations are all there is
_STEP = 1024  # budgets are multiples of it, so that a little more or less free memory gives the same one
_SHARE = 0.8  # of the free memory; the rest is for fragments and what backward passes hold for a moment


def fitting(free: int, measure: Callable[[int], tuple[int, int]], longest: int) -> int:
    """The largest multiple of 1024 tokens whose activations fit into `free` bytes.

    measure: about so many tokens -> (tokens tried, bytes they took). longest: tokens of the longest example, which must
    fit. Raises ConfigError when it does not.
    """
    (few, small), (many, large) = measure(_STEP), measure(4 * _STEP)
    each = (large - small) / (many - few) if many > few and large > small else large / many
    budget = int(_SHARE * free / each) // _STEP * _STEP
    if budget < longest:
        raise ConfigError(
            f"trainer.tokens_per_batch=null: an example of {longest} tokens does not fit into {free / 2**30:.1f} GiB; "
            "try engine.activation_checkpointing=true, engine=zero3, or a smaller dataset.max_tokens"
        )
    return budget


def on_gpu(engine: TrainingEngine, policy: Any, examples: Sequence[Example], device: torch.device) -> int:
    """Measured with the model at hand; the smallest of all processes, in every process."""
    # Blocks that torch's allocator cached for an earlier model of this process are free, but the driver counts them as
    # used: without this the second training stage of a process would find no memory.
    release_accelerator()
    lengths = [e.length for e in examples]
    order = sorted(range(len(examples)), key=lambda i: (-lengths[i], i))

    def measure(tokens: int) -> tuple[int, int]:
        chosen: list[int] = []
        while sum(lengths[i] for i in chosen) < tokens and len(chosen) < len(order):
            chosen.append(order[len(chosen)])
        before = torch.cuda.memory_allocated(device)
        with engine.micro_step(last=False):
            logps = policy(pack(examples, chosen).to(device))  # keeps its activations alive
        taken = torch.cuda.memory_allocated(device) - before
        del logps
        return sum(lengths[i] for i in chosen), taken

    trained = [p for p in policy.parameters() if p.requires_grad]
    parts = world().size if engine.zero else 1
    vocabulary = next(m for m in policy.modules() if isinstance(m, head.Head)).out_features
    # Gradients and the two moments of Adam come with the first step.
    to_come = sum(p.numel() for p in trained) * (4 + 8 // parts)
    to_come += 3 * 4 * head.CHUNK * vocabulary
    free = torch.cuda.mem_get_info(device)[0] - to_come
    budget = world().least(fitting(free, measure, max(lengths)))
    log.info("micro-batches of %d tokens, found from %.1f GiB of free memory", budget, free / 2**30)
    return budget
