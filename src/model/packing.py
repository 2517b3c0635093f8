"""Tokenized examples -> packed batches in which the responses of one prompt share it: [prompt chosen rejected]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from itertools import accumulate

import torch
from torch import Tensor

from src.data.examples import Example


@dataclass(frozen=True)
class Segment:
    """Queries [start, end) attend causally to themselves, and to all of [prefix_start, prefix_end).

    A prefix is the beginning of the last preceding segment without prefix.
    """

    start: int
    end: int
    prefix_start: int = 0
    prefix_end: int = 0


@dataclass(frozen=True)
class Layout:
    """Which positions attend to which: consecutive segments that cover the batch.

    Tensors are as variable-length kernels take them: segment i has the queries cu_seqlens_q[i] to cu_seqlens_q[i + 1]
    and the keys key_positions[cu_seqlens_k[i]:cu_seqlens_k[i + 1]], causal aligned to the bottom right.
    """

    segments: tuple[Segment, ...]
    key_positions: Tensor  # (k,) int64 positions of keys and values, segment by segment
    cu_seqlens_q: Tensor  # (segments + 1,) int32
    cu_seqlens_k: Tensor  # (segments + 1,) int32
    max_seqlen_q: int
    max_seqlen_k: int

    @staticmethod
    def from_segments(segments: Sequence[Segment]) -> Layout:
        keys = [[*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)] for s in segments]
        return Layout(
            tuple(segments),
            torch.tensor([position for positions in keys for position in positions]),
            torch.tensor([0, *(s.end for s in segments)], dtype=torch.int32),
            torch.tensor([0, *accumulate(map(len, keys))], dtype=torch.int32),
            max(s.end - s.start for s in segments),
            max(map(len, keys)),
        )

    def to(self, device: torch.device) -> Layout:
        names = ("key_positions", "cu_seqlens_q", "cu_seqlens_k")
        return replace(self, **{name: getattr(self, name).to(device, non_blocking=True) for name in names})


@dataclass(frozen=True)
class PackedBatch:
    """Examples laid end to end: `n` tokens, of which `t` positions predict a response token."""

    input_ids: Tensor  # (1, n)
    position_ids: Tensor  # (1, n), restarting after the prompt for every response
    layout: Layout
    predict_positions: Tensor  # (t,) positions whose hidden state predicts
    targets: Tensor  # (t,) the token predicted there
    sequence_ids: Tensor  # (t,) the sequence it belongs to, numbered in order of (example, response)
    num_sequences: int
    example_indices: tuple[int, ...]  # of the examples in the list that was packed

    def to(self, device: torch.device) -> PackedBatch:
        if device.type == "cpu":
            return self
        names = ("input_ids", "position_ids", "predict_positions", "targets", "sequence_ids")
        tensors = {name: getattr(self, name).to(device, non_blocking=True) for name in names}
        return replace(self, layout=self.layout.to(device), **tensors)


def pack(examples: Sequence[Example], indices: Sequence[int]) -> PackedBatch:
    """Pack the examples of these indices, in this order. Positions restart with each example and each response."""
    input_ids: list[int] = []
    position_ids: list[int] = []
    segments: list[Segment] = []
    predict_positions: list[int] = []
    targets: list[int] = []
    sequence_ids: list[int] = []
    num_sequences = 0
    for index in indices:
        example = examples[index]
        prompt_start, prompt_length = len(input_ids), len(example.prompt)
        assert prompt_length and all(example.responses) and example.num_supervised_tokens, "nothing to predict"
        assert not example.unsupervised_spans or len(example.responses) == 1, "spans are those of a single response"
        input_ids += example.prompt
        position_ids += range(prompt_length)
        for number, response in enumerate(example.responses):
            start = len(input_ids)
            input_ids += response[:-1]
            position_ids += range(prompt_length, prompt_length + len(response) - 1)
            # The first response follows its prompt without a gap, so one causal segment covers both.
            if number == 0:
                segments.append(Segment(prompt_start, len(input_ids)))
            elif len(input_ids) > start:
                segments.append(Segment(start, len(input_ids), prompt_start, prompt_start + prompt_length))
            predicting = [prompt_start + prompt_length - 1, *range(start, len(input_ids))]
            edges = [0, *(edge for span in example.unsupervised_spans for edge in span), len(response)]
            for first, end in zip(edges[::2], edges[1::2], strict=True):
                predict_positions += predicting[first:end]
                targets += response[first:end]
                sequence_ids += [num_sequences] * (end - first)
            num_sequences += 1
    return PackedBatch(
        torch.tensor([input_ids]),
        torch.tensor([position_ids]),
        Layout.from_segments(segments),
        torch.tensor(predict_positions),
        torch.tensor(targets),
        torch.tensor(sequence_ids),
        num_sequences,
        tuple(indices),
    )


@dataclass(frozen=True)
class MicroBatch:
    """Examples that one rank computes at once.

    A filler contributes nothing to the step; it keeps its rank in step with the others.
    """

    indices: tuple[int, ...]
    is_filler: bool = False


def distribute_examples(
    lengths: Sequence[int], indices: Sequence[int], token_budget: int, num_ranks: int
) -> list[list[MicroBatch]]:
    """Assign the examples of one optimizer step to ranks and micro-batches; return the micro-batches of every rank.

    Longest first, each example goes to the rank with the fewest tokens so far. Every rank gets the same number of
    micro-batches, as collectives of sharded models require: one with fewer splits its largest, and adds fillers when
    it has nothing left to split. Needs at least `num_ranks` examples.
    """
    assert len(indices) >= num_ranks, "every rank needs an example"
    indices_of_rank: list[list[int]] = [[] for _ in range(num_ranks)]
    num_tokens = [0] * num_ranks
    for index in longest_first(lengths, indices):
        rank = num_tokens.index(min(num_tokens))
        indices_of_rank[rank].append(index)
        num_tokens[rank] += lengths[index]
    batches_of_rank = [pack_first_fit(lengths, rank_indices, token_budget) for rank_indices in indices_of_rank]
    num_micro_batches = max(map(len, batches_of_rank))
    step = []
    for batches in batches_of_rank:
        while len(batches) < num_micro_batches and max(map(len, batches)) > 1:
            largest = max(range(len(batches)), key=lambda b: (len(batches[b]), -b))
            batches[largest : largest + 1] = [batches[largest][::2], batches[largest][1::2]]
        fillers = [MicroBatch((batches[-1][0],), is_filler=True)] * (num_micro_batches - len(batches))
        # Gradients are exchanged in the last backward pass, which therefore must not be a filler's.
        step.append(fillers + [MicroBatch(tuple(batch)) for batch in batches])
    return step


def pack_first_fit(lengths: Sequence[int], indices: Iterable[int], token_budget: int) -> list[list[int]]:
    """Split examples into micro-batches of at most `token_budget` tokens; a longer example is a micro-batch by itself.

    First-fit decreasing: longest first, each into the first batch with room. The outcome depends on lengths alone, and
    neighbors are alike in length. Results of training do not depend on it: every example keeps its weight.
    """
    batches: list[list[int]] = []
    room: list[int] = []
    for index in longest_first(lengths, indices):
        target = next((b for b, free in enumerate(room) if lengths[index] <= free), None)
        if target is None:
            target = len(batches)
            batches.append([])
            room.append(token_budget)
        batches[target].append(index)
        room[target] -= lengths[index]
    return batches


def longest_first(lengths: Sequence[int], indices: Iterable[int]) -> list[int]:
    """Return the indices by decreasing length; those of one length in increasing order."""
    return sorted(indices, key=lambda i: (-lengths[i], i))
