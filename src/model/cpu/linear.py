"""Linear layers in float32 on a CPU, through oneDNN.

torch's own linear layers multiply through MKL, which uses no AVX-512 on processors other than Intel's: up to half the
speed there. The sums are the same, taken in another order.
"""

from __future__ import annotations

from functools import reduce
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import linear

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

ROW_CHUNK = 512  # rows transposed at once, so that they stay in the cache


def mm_nt(a: Tensor, b: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return a @ b.T + bias, (t, n), for a (t, k) and b (n, k).

    Both must be contiguous, or the transposed view of a contiguous tensor: for other strides oneDNN has a slow
    reference loop only. Other devices and precisions use torch's linear.
    """
    if not (ONEDNN and a.device.type == "cpu" and a.dtype == torch.float32):
        return linear(a, b, bias)
    return torch.ops.mkldnn._linear_pointwise(a, b, bias, "none", [], "")


class _OneDNNLinear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, weight)
        return mm_nt(x.reshape(-1, x.shape[-1]), weight, bias).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad_output = grad_outputs[0].reshape(-1, weight.shape[0]).contiguous()
        grad_x = mm_nt(grad_output, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        rows = x.reshape(len(grad_output), -1)
        grad_weight = weight_grad(grad_output, rows) if ctx.needs_input_grad[1] else None
        grad_bias = grad_output.sum(0) if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias


def weight_grad(grad_output: Tensor, x: Tensor) -> Tensor:
    """Return grad_output.T @ x, (n, k), for grad_output (t, n) and x (t, k)."""
    if grad_output.shape[1] > x.shape[1]:  # transposing the narrower of the two is cheaper
        return transpose_contiguous(weight_grad(x, grad_output))
    chunks = zip(grad_output.split(ROW_CHUNK), x.split(ROW_CHUNK), strict=True)
    return reduce(Tensor.add_, (mm_nt(transpose_contiguous(grad_chunk), x_chunk.t()) for grad_chunk, x_chunk in chunks))


def transpose_contiguous(x: Tensor) -> Tensor:
    """Return the contiguous transpose of a 2-D tensor.

    A batch dimension makes torch use its multi-threaded copy kernel; its transposed copy in 2-D is single-threaded.
    """
    return x[None].transpose(1, 2).contiguous()[0]


class OneDNNLinear(torch.nn.Linear):
    """A linear layer that multiplies through oneDNN where it computes in float32 on a CPU, and as torch's elsewhere."""

    def forward(self, x: Tensor) -> Tensor:
        is_plain_float32 = x.dtype == torch.float32 and not torch.is_autocast_enabled("cpu")
        if not ONEDNN or x.device.type != "cpu" or not is_plain_float32 or torch.compiler.is_compiling():
            return super().forward(x)
        return _OneDNNLinear.apply(x, self.weight, self.bias)
