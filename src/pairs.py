"""Tokenised examples -> packed batches in which the responses of one prompt share it: [prompt chosen rejected]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Example:
    """A tokenised prompt and its responses: (chosen, rejected) of a pair, or a single one.

    Every response holds its end-of-sequence token where it was not cut, and at least one token.
    """

    prompt: tuple[int, ...]
    responses: tuple[tuple[int, ...], ...]

    @property
    def length(self) -> int:
        """Tokens the model sees: the prompt once, each response without its last token (it predicts nothing)."""
        return len(self.prompt) + sum(len(r) - 1 for r in self.responses)


@dataclass(frozen=True)
class Segment:
    """Queries [start, end) attend causally to themselves and to all of [prefix_start, prefix_end)."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True)
class PackedBatch:
    """Examples laid end to end, `n` tokens in all; `t` of the positions predict a response token."""

    input_ids: Tensor  # (1, n)
    position_ids: Tensor  # (1, n), restarting after the prompt for every response
    segments: tuple[Segment, ...]
    predict_from: Tensor  # (t,) positions whose hidden state predicts
    targets: Tensor  # (t,) the token predicted there
    sequence: Tensor  # (t,) which sequence it belongs to, in order of (example, response)
    sequences: int
    examples: tuple[int, ...]  # indices of the examples in the list that was packed

    @property
    def tokens(self) -> int:
        return self.input_ids.shape[1]

    def to(self, device: torch.device) -> PackedBatch:
        if device.type == "cpu":
            return self
        moved = {
            name: getattr(self, name).to(device, non_blocking=True)
            for name in ("input_ids", "position_ids", "predict_from", "targets", "sequence")
        }
        return PackedBatch(**moved, segments=self.segments, sequences=self.sequences, examples=self.examples)


def pack(examples: Sequence[Example], indices: Sequence[int]) -> PackedBatch:
    """Lay out the given examples in the given order. Positions restart with each example and each response."""
    ids: list[int] = []
    positions: list[int] = []
    segments: list[Segment] = []
    predict_from: list[int] = []
    targets: list[int] = []
    sequence: list[int] = []
    count = 0
    for index in indices:
        example = examples[index]
        begin, length = len(ids), len(example.prompt)
        assert length and all(example.responses), "nothing to predict from, or nothing to predict"
        ids += example.prompt
        positions += range(length)
        for number, response in enumerate(example.responses):
            start = len(ids)
            ids += response[:-1]
            positions += range(length, length + len(response) - 1)
            # The first response follows its prompt without a gap: one causal segment covers both.
            if number == 0:
                segments.append(Segment(begin, len(ids)))
            elif len(ids) > start:
                segments.append(Segment(start, len(ids), begin, begin + length))
            predict_from += [begin + length - 1, *range(start, len(ids))]
            targets += response
            sequence += [count] * len(response)
            count += 1
    return PackedBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        tuple(segments),
        torch.tensor(predict_from),
        torch.tensor(targets),
        torch.tensor(sequence),
        count,
        tuple(indices),
    )


def share(lengths: Sequence[int], indices: Sequence[int], rank: int, size: int) -> list[int]:
    """The part of a step's examples that process `rank` of `size` computes: alike in number and length for all."""
    if size == 1:
        return list(indices)
    order = sorted(indices, key=lambda i: (-lengths[i], i))
    # There and back again, so that nobody always gets the longer one of neighbours.
    return [i for n, i in enumerate(order) if (n % size if n // size % 2 == 0 else size - 1 - n % size) == rank]


def partition(lengths: Sequence[int], indices: Iterable[int], token_budget: int) -> list[list[int]]:
    """Split examples into micro-batches of at most `token_budget` tokens (a longer example goes alone).

    Longest first, each into the first batch with room, so the outcome depends on lengths alone and neighbours
    are alike in length. Results of training do not depend on it: every example keeps its weight.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        place = next((b for b, free in enumerate(room) if lengths[index] <= free), None)
        if place is None:
            batches.append([])
            room.append(token_budget)
            place = len(batches) - 1
        batches[place].append(index)
        room[place] -= lengths[index]
    return batches
