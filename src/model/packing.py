"""Tokenized examples -> packed batches in which the responses of one prompt share it: [prompt chosen rejected]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import accumulate
from typing import TYPE_CHECKING

import torch

from src.data.examples import Example

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class Segment:
    """Queries [start, end) attend causally to themselves and to all of [prefix_start, prefix_end): the beginning of the
    last segment before it that has no prefix itself."""

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True)
class Layout:
    """Which positions attend to which: segments that cover the batch one after the other, as the kernels take them.

    The tensors are those of variable-length attention: segment i owns the queries from cu_seqlens_q[i] to
    cu_seqlens_q[i + 1] and the keys keys[cu_seqlens_k[i]:cu_seqlens_k[i + 1]], causal aligned to the bottom right.
    """

    segments: tuple[Segment, ...]
    keys: Tensor  # (k,) positions whose keys and values are seen, segment by segment
    cu_seqlens_q: Tensor  # (segments + 1,) int32
    cu_seqlens_k: Tensor  # (segments + 1,) int32

    @staticmethod
    def of(segments: Sequence[Segment]) -> Layout:
        ranges = [(range(s.prefix_start, s.prefix_end), range(s.start, s.end)) for s in segments]
        keys = [position for prefix, own in ranges for part in (prefix, own) for position in part]
        counts = [len(prefix) + len(own) for prefix, own in ranges]
        return Layout(
            tuple(segments),
            torch.tensor(keys),
            torch.tensor([0, *(s.end for s in segments)], dtype=torch.int32),
            torch.tensor([0, *accumulate(counts)], dtype=torch.int32),
        )

    @cached_property
    def table(self) -> Tensor:
        """(segments, 4) int64: start, end, prefix_start, prefix_end of each, on the CPU."""
        return torch.tensor([[s.start, s.end, s.prefix_start, s.prefix_end] for s in self.segments])

    @cached_property
    def longest(self) -> tuple[int, int]:
        """Most queries and most keys of a segment."""
        queries = [s.end - s.start for s in self.segments]
        prefixes = [s.prefix_end - s.prefix_start for s in self.segments]
        return max(queries), max(q + p for q, p in zip(queries, prefixes, strict=True))

    def to(self, device: torch.device) -> Layout:
        keys, queries, starts = (
            t.to(device, non_blocking=True) for t in (self.keys, self.cu_seqlens_q, self.cu_seqlens_k)
        )
        return Layout(self.segments, keys, queries, starts)


@dataclass(frozen=True)
class PackedBatch:
    """Examples laid end to end, `n` tokens in all; `t` of the positions predict a response token."""

    input_ids: Tensor  # (1, n)
    position_ids: Tensor  # (1, n), restarting after the prompt for every response
    layout: Layout
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
        return PackedBatch(**moved, layout=self.layout.to(device), sequences=self.sequences, examples=self.examples)


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
        assert length and all(example.responses) and example.num_supervised_tokens, (
            "nothing to predict from, or nothing to predict"
        )
        assert not example.unsupervised_spans or len(example.responses) == 1, "a pair's responses are learned whole"
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
            places = [begin + length - 1, *range(start, len(ids))]
            bounds = [0, *(edge for span in example.unsupervised_spans for edge in span), len(response)]
            for first, last in zip(bounds[::2], bounds[1::2], strict=True):
                predict_from += places[first:last]
                targets += response[first:last]
                sequence += [count] * (last - first)
            count += 1
    return PackedBatch(
        torch.tensor([ids]),
        torch.tensor([positions]),
        Layout.of(segments),
        torch.tensor(predict_from),
        torch.tensor(targets),
        torch.tensor(sequence),
        count,
        tuple(indices),
    )


@dataclass(frozen=True)
class MicroBatch:
    """Examples computed at once by one process; a filler contributes nothing and only keeps its rank in step with the others."""

    indices: tuple[int, ...]
    is_filler: bool = False


def distribute_examples(
    lengths: Sequence[int], indices: Sequence[int], token_budget: int, processes: int
) -> list[list[MicroBatch]]:
    """Who computes which of a step's examples, and when: the micro-batches of every process, as many for each.

    Longest first, each to the process with the fewest tokens so far, so all have alike much to do. A process with fewer
    micro-batches than others splits its own, and repeats one that does not count when it has nothing left to split:
    processes that hold parts of one model must call it equally often. At least `processes` examples.
    """
    assert len(indices) >= processes, "every process has an example"
    own: list[list[int]] = [[] for _ in range(processes)]
    tokens = [0] * processes
    for index in sorted(indices, key=lambda i: (-lengths[i], i)):
        process = min(range(processes), key=lambda p: (tokens[p], p))
        own[process].append(index)
        tokens[process] += lengths[index]
    split = [pack_first_fit(lengths, mine, token_budget) for mine in own]
    most = max(len(batches) for batches in split)
    steps = []
    for batches in split:
        while len(batches) < most and max(len(b) for b in batches) > 1:
            largest = max(range(len(batches)), key=lambda b: (len(batches[b]), -b))
            batches[largest : largest + 1] = [batches[largest][::2], batches[largest][1::2]]
        fillers = [MicroBatch((batches[-1][0],), is_filler=True)] * (most - len(batches))
        # Gradients are exchanged in the last backward pass: let that be a real one.
        steps.append(fillers + [MicroBatch(tuple(b)) for b in batches])
    return steps


def pack_first_fit(lengths: Sequence[int], indices: Iterable[int], token_budget: int) -> list[list[int]]:
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
