"""Tokenized examples -> packed batches in which the responses of one prompt share it: [prompt chosen rejected]."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.data.examples import Example


class Segment(NamedTuple):
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
        start, end, prefix_start, prefix_end = np.array(segments).T
        prefix_length, length = prefix_end - prefix_start, end - start
        # The keys of a segment are two ranges of positions: its prefix, then itself.
        range_starts, range_lengths = (
            np.stack(pair, 1).ravel() for pair in ((prefix_start, start), (prefix_length, length))
        )
        cu_seqlens_k = np.concatenate([[0], np.cumsum(prefix_length + length)])
        return Layout(
            tuple(segments),
            torch.as_tensor(_ranges(range_starts, range_lengths)),
            torch.as_tensor(np.concatenate([[0], end]), dtype=torch.int32),
            torch.as_tensor(cu_seqlens_k, dtype=torch.int32),
            int(length.max()),
            int((prefix_length + length).max()),
        )


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
    example_indices: Tensor  # (examples,) int64, of the examples in the list that was packed

    def to(self, device: torch.device) -> PackedBatch:
        """Return the batch on `device`; on a GPU by one copy from pinned memory, for which nothing waits."""
        if device.type == "cpu":
            return self
        tensors, layout = _tensors(self), _tensors(self.layout)
        copies = copy_together([*tensors.values(), *layout.values()], device)
        of_layout: dict[str, Any] = dict(zip(layout, copies[len(tensors) :], strict=True))
        of_batch: dict[str, Any] = dict(zip(tensors, copies, strict=False))
        return replace(self, layout=replace(self.layout, **of_layout), **of_batch)


def _tensors(record: PackedBatch | Layout) -> dict[str, Tensor]:
    return {name: value for name, value in vars(record).items() if isinstance(value, Tensor)}


def copy_together(tensors: Sequence[Tensor], device: torch.device) -> list[Tensor]:
    """Return copies on `device` of integer tensors on the CPU, made by one transfer of int64 numbers."""
    sizes = [tensor.numel() for tensor in tensors]
    block = torch.empty(sum(sizes), dtype=torch.int64, pin_memory=device.type == "cuda")
    torch.cat([tensor.flatten().long() for tensor in tensors], out=block)
    parts = block.to(device, non_blocking=True).split(sizes)
    return [part.view(tensor.shape).to(tensor.dtype) for part, tensor in zip(parts, tensors, strict=True)]


def pack(examples: Sequence[Example], indices: Sequence[int]) -> PackedBatch:
    """Pack the examples of these indices, in this order. Positions restart with each example and each response.

    A piece is a prompt or a response. The last token of a response is a target that the model does not read.
    """
    all_tokens: list[int] = []
    lengths: list[int] = []
    responses: list[bool] = []  # whether a piece is one
    spans: list[tuple[int, int, int]] = []  # the piece, and its first token without loss and the one after the last
    for index in indices:
        example = examples[index]
        assert example.prompt and all(example.responses) and example.num_supervised_tokens, "nothing to predict"
        assert not example.unsupervised_spans or len(example.responses) == 1, "spans are those of a single response"
        spans += [(len(lengths) + 1, *span) for span in example.unsupervised_spans]
        pieces = (example.prompt, *example.responses)
        for tokens_of_piece in pieces:
            all_tokens += tokens_of_piece
        lengths += map(len, pieces)
        responses += [False, *(True for _ in example.responses)]
    tokens, length, is_response = np.array(all_tokens, np.int64), np.array(lengths), np.array(responses)
    first_token = np.cumsum(length) - length
    num_read = length - is_response
    start = np.cumsum(num_read) - num_read  # the position of the first token of a piece in the batch
    prompt = np.maximum.accumulate(np.where(is_response, 0, np.arange(len(length))))  # the piece that is its prompt

    is_read = np.ones(len(tokens), bool)
    is_read[(first_token + length - 1)[is_response]] = False
    is_target = np.repeat(is_response, length)
    for response, begin, end in spans:
        is_target[first_token[response] + begin : first_token[response] + end] = False
    # A token is predicted at the position before it, the first one of each response at the last one of its prompt.
    predicted_at = _ranges(start - 1, length)
    predicted_at[first_token[is_response]] = (start + length - 1)[prompt[is_response]]
    return PackedBatch(
        torch.as_tensor(tokens[is_read])[None],
        torch.as_tensor(_ranges(np.where(is_response, length[prompt], 0), num_read))[None],
        Layout.from_segments(_segments(is_response, prompt, start, start + num_read)),
        torch.as_tensor(predicted_at[is_target]),
        torch.as_tensor(tokens[is_target]),
        torch.as_tensor(np.repeat(np.cumsum(is_response) - 1, length)[is_target]),
        int(is_response.sum()),
        torch.tensor(indices),
    )


def _segments(is_response: NDArray[Any], prompt: NDArray[Any], start: NDArray[Any], end: NDArray[Any]) -> list[Segment]:
    """Return the segments of pieces at the positions [start, end); prompt: the piece that is the prompt of each."""
    prompt_start, prompt_end = start[prompt], end[prompt]
    # The first response follows its prompt without a gap, so one causal segment covers both.
    is_first = is_response & (prompt == np.arange(len(prompt)) - 1)
    starts = np.where(is_first, prompt_start, start)
    prefix_starts, prefix_ends = np.where(is_first, 0, prompt_start), np.where(is_first, 0, prompt_end)
    is_segment = is_response & (end > starts)  # a response of one token is not read
    rows = np.stack([starts, end, prefix_starts, prefix_ends], 1)[is_segment]
    return [Segment(*row) for row in rows.tolist()]


def _ranges(starts: NDArray[Any], lengths: NDArray[Any]) -> NDArray[Any]:
    """Return start, start + 1, ..., start + length - 1 of every range, one after the other: int64."""
    offsets = np.cumsum(lengths) - lengths
    return np.arange(lengths.sum()) + np.repeat(starts - offsets, lengths)


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
