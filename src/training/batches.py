"""What every optimizer step computes: its examples, packed into micro-batches, prepared ahead of time in a thread."""

from __future__ import annotations

from collections.abc import Callable, Generator, Iterable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TypeVar

import torch

from src.data.examples import Example
from src.distributed import get_distributed
from src.model.packing import MicroBatch, PackedBatch, distribute_examples, pack
from src.training.token_budget import TokenBudget

T = TypeVar("T")
R = TypeVar("R")


@dataclass(frozen=True)
class GlobalBatch:
    """The size of one optimizer step over all ranks and micro-batches."""

    num_examples: int
    num_supervised_tokens: int


@dataclass(frozen=True)
class PreparedMicroBatch:
    """A micro-batch of this rank, on its device.

    recompute: whether its activations are computed again in the backward pass, the same on all ranks; None: as the
    engine is configured.
    """

    packed: PackedBatch
    is_filler: bool
    recompute: bool | None


@dataclass(frozen=True)
class StepBatch:
    """What this rank computes in one optimizer step."""

    size: GlobalBatch
    num_tokens: int  # of this rank's examples
    micro_batches: tuple[PreparedMicroBatch, ...]


def batch_indices(step: int, num_examples: int, batch_size: int, seed: int) -> list[int]:
    """Return the examples of a step: consecutive slices of one seeded permutation per epoch, across epoch ends."""
    indices: list[int] = []
    while len(indices) < batch_size:
        epoch, offset = divmod(step * batch_size + len(indices), num_examples)
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        order = torch.randperm(num_examples, generator=generator).tolist()
        indices += order[offset : offset + batch_size - len(indices)]
    return indices


class StepPlanner:
    """Prepares the steps of a run, in any order: a step depends on its number alone."""

    def __init__(
        self, examples: Sequence[Example], batch_size: int, seed: int, budget: TokenBudget, device: torch.device
    ) -> None:
        self.examples, self.batch_size, self.seed, self.budget, self.device = examples, batch_size, seed, budget, device
        sizes = [(example.length, example.num_supervised_tokens) for example in examples]
        self.lengths, self.supervised = (list(column) for column in zip(*sizes, strict=True))

    def prepare(self, step: int) -> StepBatch:
        """Choose the examples of a step, distribute them over the ranks, and pack those of this rank."""
        ranks = get_distributed()
        indices = batch_indices(step, len(self.examples), self.batch_size, self.seed)
        of_all_ranks = distribute_examples(self.lengths, indices, self.budget.tokens, ranks.size)
        of_this_rank = of_all_ranks[ranks.rank]
        size = GlobalBatch(len(indices), sum(self.supervised[i] for i in indices))
        micro_batches = tuple(
            PreparedMicroBatch(
                pack(self.examples, micro_batch.indices).to(self.device),
                micro_batch.is_filler,
                # Collectives of sharded models are the same on all ranks only if all of them decide alike.
                self.budget.recomputes(max(map(self._num_tokens, same_number))),
            )
            for micro_batch, same_number in zip(of_this_rank, zip(*of_all_ranks, strict=True), strict=True)
        )
        num_tokens = sum(self._num_tokens(m) for m in of_this_rank if not m.is_filler)
        return StepBatch(size, num_tokens, micro_batches)

    def _num_tokens(self, micro_batch: MicroBatch) -> int:
        return sum(self.lengths[i] for i in micro_batch.indices)


def prefetch(function: Callable[[T], R], items: Iterable[T], device: torch.device) -> Generator[R, None, None]:
    """Yield function(item) of every item; the next one is computed in a thread while the caller uses this one.

    device: of the tensors that the function returns. Raises what the function raises, in its place. Close the generator
    to end the thread before the items end.
    """
    index = torch.cuda.current_device() if device.type == "cuda" else None

    def start_thread() -> None:
        if index is not None:
            torch.cuda.set_device(index)  # every thread begins with GPU 0

    with ThreadPoolExecutor(1, thread_name_prefix="prefetch", initializer=start_thread) as executor:
        pending: Future[R] | None = None
        for item in items:
            ready, pending = pending, executor.submit(function, item)
            if ready is not None:
                yield ready.result()
        if pending is not None:
            yield pending.result()
