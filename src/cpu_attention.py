"""Attention in float32 on a CPU, its products through oneDNN. torch's own CPU kernel multiplies small tiles through MKL
at a sixth of the rate; here a block of queries meets all its keys at once, for all query heads that share them."""

from __future__ import annotations

from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from src.linear import product, turned

if TYPE_CHECKING:
    from torch import Tensor

    from src.pairs import Segment


_BLOCK = 176  # queries: half of what a causal segment would look at is masked away; of blocks, little
_HIDDEN_AREA = 20_000  # (query, key) pairs computed for nothing that cost as much as one more block, measured


class BlockedAttention(torch.autograd.Function):
    """query (1, heads, n, d), key and value (1, kv_heads, n, d), float32, and the blocks that cover the n positions
    -> (1, n, heads, d). Of the probabilities nothing is kept: they are computed again in the backward pass."""

    @staticmethod
    def forward(
        ctx: Any, query: Tensor, key: Tensor, value: Tensor, scaling: float, blocks: tuple[Block, ...]
    ) -> Tensor:
        (heads, n, d), kv_heads = query.shape[1:], key.shape[1]
        # Rows in order of (position, head of the group): those of a block are one piece of memory.
        q = query.new_empty(kv_heads, n, heads // kv_heads, d)
        torch.mul(query[0].view(kv_heads, -1, n, d).transpose(1, 2), scaling, out=q)
        k, v = key[0].contiguous(), value[0].contiguous()
        out = torch.empty_like(q)
        for block in blocks:
            rows = slice(block.start, block.end)
            for queries, keys, values, to in zip(
                q[:, rows], _seen(k, block), _seen(v, block), out[:, rows], strict=True
            ):
                to.copy_(product(_probabilities(queries, keys, block.hidden), values.t()).view(to.shape))
        out = out.transpose(0, 1).contiguous()
        ctx.save_for_backward(q, k, v, out)
        ctx.scaling, ctx.blocks = scaling, blocks
        return out.view(1, n, heads, d)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        q, k, v, out = ctx.saved_tensors
        kv_heads, n, group, d = q.shape
        gradient = gradients[0].view(n, kv_heads, group, d)
        # Of a softmax: dS = P * (dP - sum of P * dP), and that sum is the one of out * gradient.
        inner = (gradient * out).sum(-1).transpose(0, 1).contiguous()
        of_out = gradient.transpose(0, 1).contiguous()
        of_q = torch.empty_like(q)
        of_k, of_v = k.new_zeros(kv_heads, d, n), k.new_zeros(kv_heads, d, n)  # the faster way round for a product
        for block in ctx.blocks:
            rows = slice(block.start, block.end)
            pieces = (x[:, rows] for x in (q, of_out, inner, of_q))
            for queries, of_rows, own, to, keys, values, to_k, to_v in zip(
                *pieces, _seen(k, block), _seen(v, block), of_k, of_v, strict=True
            ):
                p = _probabilities(queries, keys, block.hidden)
                of_rows = of_rows.view(-1, d)
                _add(to_v, product(turned(of_rows), p.t()), block)
                of_scores = product(of_rows, values).sub_(own.view(-1, 1)).mul_(p)
                to.copy_(product(of_scores, keys.t()).view(to.shape))
                _add(to_k, product(turned(queries.view(-1, d)), of_scores.t()), block)
        of_query = torch.mul(of_q.transpose(0, 1), ctx.scaling, out=torch.empty_like(out)).view(n, -1, d)
        of_key, of_value = (x.permute(2, 0, 1).contiguous() for x in (of_k, of_v))
        return *(x.transpose(0, 1)[None] for x in (of_query, of_key, of_value)), None, None


@dataclass(frozen=True)
class Block:
    """Queries [start, end) that see the prefix and [first, end), but for what `hidden` (queries, 1, last keys), 0 or
    -inf, keeps from them."""

    start: int
    end: int
    first: int
    prefix_start: int
    prefix_end: int
    hidden: Tensor


@lru_cache(maxsize=4)
def blocks_of(segments: tuple[Segment, ...]) -> tuple[Block, ...]:
    """The segments cut into blocks. A short response goes on in the block of the response before it, which is hidden
    from it: less to multiply than to call."""
    runs: list[tuple[Segment, list[Segment]]] = []  # a segment, and those that go on in it
    for s in segments:
        if runs and s.prefix_end > s.prefix_start:
            head, more = runs[-1]
            follows = s.prefix_start == head.start and head.prefix_start == head.prefix_end
            if follows and (s.end - s.start) * (s.start - s.prefix_end) <= _HIDDEN_AREA:
                more.append(s)
                continue
        runs.append((s, []))
    blocks = []
    for head, more in runs:
        end = more[-1].end if more else head.end
        count = max(1, round((end - head.start) / _BLOCK))
        cuts = [head.start + (end - head.start) * number // count for number in range(count + 1)]
        for a, b in pairwise(cuts):
            inside = [s for s in more if s.start < b and s.end > a]
            lowest = min([a, *(s.prefix_end for s in inside)])
            hidden = torch.zeros(b - a, b - lowest)
            hidden[:, a - lowest :] = torch.full((b - a, b - a), -torch.inf).triu_(1)
            for s in inside:
                hidden[max(s.start - a, 0) : s.end - a, s.prefix_end - lowest : s.start - lowest] = -torch.inf
            blocks.append(Block(a, b, head.start, head.prefix_start, head.prefix_end, hidden[:, None]))
    return tuple(blocks)


def _probabilities(queries: Tensor, keys: Tensor, hidden: Tensor) -> Tensor:
    """(block, group, d), (seen, d) -> (block * group, seen)."""
    block, group, d = queries.shape
    scores = product(queries.view(-1, d), keys)
    scores.view(block, group, -1)[:, :, -hidden.shape[2] :] += hidden
    return scores.softmax(1)


def _seen(x: Tensor, block: Block) -> Tensor:
    """(kv_heads, n, d) -> (kv_heads, seen, d): what the block sees, its own positions last."""
    own = x[:, block.first : block.end]
    if block.prefix_start == block.prefix_end:
        return own
    return torch.cat([x[:, block.prefix_start : block.prefix_end], own], dim=1)


def _add(total: Tensor, part: Tensor, block: Block) -> None:
    """(d, seen) added where it belongs in (d, n)."""
    prefix = block.prefix_end - block.prefix_start
    total[:, block.prefix_start : block.prefix_end] += part[:, :prefix]
    total[:, block.first : block.end] += part[:, prefix:]
