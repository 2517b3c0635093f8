"""Attention in float32 on a CPU, its products through oneDNN. torch's own CPU kernel multiplies through MKL, at a sixth
of the rate, and knows no prefix that several segments share."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from src.model.cpu import kernels

if TYPE_CHECKING:
    from torch import Tensor


class PackedAttention(torch.autograd.Function):
    """query (1, heads, n, d), key and value (1, kv_heads, n, d), float32, segments (s, 4) int64 -> (1, n, heads, d).
    Of the probabilities nothing is kept: they are computed again in the backward pass."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scaling: float) -> Tensor:
        assert query.shape[0] == 1, "a packed batch is one row"
        inputs = *(_rows(x[0]) for x in (query, key, value)), segments, scaling
        out, softmax = kernels.load().attention(*inputs)
        ctx.save_for_backward(*inputs[:4], out, softmax)
        ctx.scaling = scaling
        return out.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, out, softmax = ctx.saved_tensors
        gradient = _rows(gradients[0][0].transpose(0, 1))
        found = kernels.load().attention_backward(*inputs, ctx.scaling, out, softmax, gradient)
        return *(x[None] for x in found), None, None


def _rows(x: Tensor) -> Tensor:
    """With each vector in one piece, as the kernel takes them."""
    return x if x.stride(-1) == 1 else x.contiguous()
