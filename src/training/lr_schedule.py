"""The number of optimizer steps, and the learning rate of each."""

from __future__ import annotations

import math

from src.config.schema import Training


def total_steps(num_examples: int, trainer: Training) -> int:
    """Return the whole batches in `epochs` passes, at least one and at most max_steps."""
    steps = max(1, math.floor(num_examples * trainer.epochs / trainer.batch_size))
    return min(steps, trainer.max_steps or steps)


def lr_multiplier(step: int, total: int, trainer: Training) -> float:
    """Return the fraction of the peak rate at `step` of 0 .. total - 1.

    Linear warm-up over warmup_ratio of the steps, then `linear` or `cosine` decay to 0, or `constant`.
    """
    warmup = math.ceil(trainer.warmup_ratio * total)
    if step < warmup:
        return (step + 1) / warmup
    remaining = (total - step) / max(1, total - warmup)
    if trainer.lr_scheduler_type == "cosine":
        return 0.5 * (1 - math.cos(math.pi * remaining))
    return 1.0 if trainer.lr_scheduler_type == "constant" else remaining
