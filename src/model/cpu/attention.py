"""Attention in float32 on a CPU, with products through oneDNN.

torch's own CPU kernel multiplies small tiles through MKL, at a sixth of the rate where it was measured. Here a block of
queries is multiplied with all its keys at once, for all query heads that share a key-value head.
"""

from __future__ import annotations

from collections.abc import Iterable
from functools import cache, lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
from torch.autograd.function import once_differentiable

from src.model.cpu.linear import mm_nt, transpose_contiguous

if TYPE_CHECKING:
    from torch import Tensor

    from src.model.packing import Segment

BLOCK_QUERIES = 192  # more of them compute more scores above the diagonal, fewer call more products


class Block(NamedTuple):
    """Queries that attend to all of the prefix, and each to the causal keys up to itself.

    hidden: of the first keys, query i does not attend to those before i + hidden, which may be negative; None: to all.
    """

    queries: slice
    prefix: slice
    causal: slice
    hidden: int | None = None


class BlockAttention(torch.autograd.Function):
    """Attention whose probabilities are computed again in the backward pass instead of being saved.

    query: (1, heads, n, d); key, value: (1, kv_heads, n, d), float32. Returns (1, n, heads, d).
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        segments: Iterable[Segment],
        scaling: float,
        window: int | None = None,
    ) -> Tensor:
        (heads, n, d), kv_heads = query.shape[1:], key.shape[1]
        q = (query[0].view(kv_heads, -1, n, d) * scaling).transpose(1, 2).contiguous()  # a block is contiguous
        k, v = key[0].contiguous(), value[0].contiguous()
        output = torch.empty_like(q)
        for block in (blocks := _blocks(segments, window)):
            for head in range(kv_heads):
                rows = output[head, block.queries]
                weights = _softmax(q[head, block.queries], _keys(k[head], block), block.hidden)
                rows.copy_(mm_nt(weights, _keys(v[head], block).t()).view(rows.shape))
        output = output.transpose(0, 1).contiguous()
        ctx.save_for_backward(q, k, v, output)
        ctx.blocks, ctx.scaling = blocks, scaling
        return output.view(1, n, heads, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, output = ctx.saved_tensors
        kv_heads, n, _, d = q.shape
        grad_output = grad_outputs[0].view(output.shape)
        # Gradient of a softmax: dS = P * (dP - sum(P * dP)), whose sum equals that of output * grad_output.
        delta = (grad_output * output).sum(-1).transpose(0, 1).contiguous()
        grad_output = grad_output.transpose(0, 1).contiguous()
        grad_q = torch.empty_like(q)
        grad_k, grad_v = k.new_zeros(kv_heads, d, n), v.new_zeros(kv_heads, d, n)  # products come out transposed
        for block in ctx.blocks:
            for head in range(kv_heads):
                queries, grad_rows = q[head, block.queries], grad_output[head, block.queries].view(-1, d)
                keys = _keys(k[head], block)
                weights = _softmax(queries, keys, block.hidden)
                _add_to_keys(grad_v[head], mm_nt(transpose_contiguous(grad_rows), weights.t()), block)
                grad_scores = mm_nt(grad_rows, _keys(v[head], block))
                grad_scores.sub_(delta[head, block.queries].view(-1, 1)).mul_(weights)
                grad_q[head, block.queries] = mm_nt(grad_scores, keys.t()).view(queries.shape)
                _add_to_keys(grad_k[head], mm_nt(transpose_contiguous(queries.view(-1, d)), grad_scores.t()), block)
        grad_query = grad_q.mul_(ctx.scaling).transpose(1, 2).reshape(1, -1, n, d)
        return grad_query, grad_k.transpose(1, 2)[None], grad_v.transpose(1, 2)[None], None, None, None


def _blocks(segments: Iterable[Segment], window: int | None) -> list[Block]:
    blocks = []
    for s in segments:
        num_blocks = max(1, round((s.end - s.start) / BLOCK_QUERIES))
        edges = [s.start + (s.end - s.start) * i // num_blocks for i in range(num_blocks + 1)]
        prefix_length = s.prefix_end - s.prefix_start
        for start, end in pairwise(edges):
            # Positions in the sequence, whose prefix may lie anywhere before the segment.
            first, last = prefix_length + start - s.start, prefix_length + end - s.start - 1
            oldest = max(0, first - window + 1) if window else 0  # that the first query attends to; others are left out
            prefix = slice(s.prefix_start + min(oldest, prefix_length), s.prefix_end)
            causal = slice(s.start + max(0, oldest - prefix_length), end)
            hidden = first - window + 1 - oldest if window and last >= window else None
            blocks.append(Block(slice(start, end), prefix, causal, hidden))
    return blocks


def _keys(x: Tensor, block: Block) -> Tensor:
    """Return the rows of x (n, d) that the block attends to, those of its own positions last."""
    return torch.cat([x[block.prefix], x[block.causal]])


def _softmax(queries: Tensor, keys: Tensor, hidden: int | None) -> Tensor:
    """Return attention weights (b * group, keys) of queries (b, group, d); the last b keys are at their positions.

    hidden: as of a Block.
    """
    b, group, d = queries.shape
    scores = mm_nt(queries.view(-1, d), keys)
    scores.view(b, group, -1)[:, :, -b:].masked_fill_(_above_diagonal(b), -torch.inf)
    if hidden is not None:
        scores.view(b, group, -1).masked_fill_(_before_window(b, len(keys), hidden), -torch.inf)
    return scores.softmax(1)


@cache  # of at most 1.5 BLOCK_QUERIES different sizes
def _above_diagonal(b: int) -> Tensor:
    return torch.ones(b, b, dtype=torch.bool).triu_(1)[:, None]


@lru_cache(maxsize=16)  # a layer has few: those of its first blocks, and one of all later blocks of a size
def _before_window(b: int, num_keys: int, hidden: int) -> Tensor:
    return torch.ones(b, num_keys, dtype=torch.bool).tril_(hidden - 1)[:, None]


def _add_to_keys(grad: Tensor, block_grad: Tensor, block: Block) -> None:
    """Add the gradient of a block's keys, (d, keys), to that of all keys, (d, n)."""
    prefix_length = block.prefix.stop - block.prefix.start
    grad[:, block.prefix] += block_grad[:, :prefix_length]
    grad[:, block.causal] += block_grad[:, prefix_length:]
