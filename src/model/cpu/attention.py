"""Attention in float32 on a CPU, with products through oneDNN, in C++.

torch's own CPU kernel multiplies through MKL, at a sixth of the rate where it was measured, and has no prefix that
several segments share.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

from src.model.cpu import kernels

if TYPE_CHECKING:
    from torch import Tensor


class PackedAttention(torch.autograd.Function):
    """Attention whose probabilities are computed again in the backward pass instead of being saved.

    query: (1, heads, n, d); key, value: (1, kv_heads, n, d), float32; segments: (s, 4) int64. Returns (1, n, heads, d).
    """

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, segments: Tensor, scaling: float) -> Tensor:
        assert query.shape[0] == 1, "a packed batch has one row"
        inputs = *(_contiguous_last_dim(x[0]) for x in (query, key, value)), segments, scaling
        output, softmax = kernels.load().attention(*inputs)
        ctx.save_for_backward(*inputs[:4], output, softmax)
        ctx.scaling = scaling
        return output.transpose(0, 1)[None]

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        *inputs, output, softmax = ctx.saved_tensors
        grad_output = _contiguous_last_dim(grad_outputs[0][0].transpose(0, 1))
        grads = kernels.load().attention_backward(*inputs, ctx.scaling, output, softmax, grad_output)
        return *(grad[None] for grad in grads), None, None


def _contiguous_last_dim(x: Tensor) -> Tensor:
    """Return x, copied if its last dimension is strided, which the kernel does not take."""
    return x if x.stride(-1) == 1 else x.contiguous()
