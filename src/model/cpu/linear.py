"""Linear layers in float32 on a CPU, through oneDNN. What torch calls for them, MKL, keeps to AVX2 on processors of
makers other than Intel: half the speed where there is AVX-512. Same sums in another order."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

ONEDNN = torch.backends.mkldnn.is_available() and hasattr(torch.ops.mkldnn, "_linear_pointwise")

_PIECE = 512  # rows transposed at once: they stay in the cache
_TERMS = 192  # of a careful sum's parts, as MKL has them


def product(rows: Tensor, weight: Tensor, bias: Tensor | None = None, *, careful: bool = False) -> Tensor:
    """(t, k), (n, k) -> rows @ weight.T + bias, (t, n). Each contiguous, or the transposed view of what is: strides of
    any other kind send oneDNN into a reference loop. oneDNN adds up all k terms one after the other, and rounds each
    time; careful: 192 of them at a time, then those sums: half the rounding, a third more time."""
    if not (ONEDNN and rows.device.type == "cpu" and rows.dtype == torch.float32):
        return torch.nn.functional.linear(rows, weight, bias)
    if careful and rows.shape[1] > _TERMS:
        total = None
        for part, its in zip(rows.split(_TERMS, dim=1), weight.split(_TERMS, dim=1), strict=True):
            total = added(total, part.contiguous(), its.contiguous().t())
        assert total is not None
        return total if bias is None else total.add_(bias)
    return torch.ops.mkldnn._linear_pointwise(rows, weight, bias, "none", [], "")


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, careful: bool) -> Tensor:
        ctx.save_for_backward(x, weight)
        rows = x.reshape(-1, x.shape[-1])
        return product(rows, weight, bias, careful=careful).view(*x.shape[:-1], weight.shape[0])

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        rows = gradients[0].reshape(-1, weight.shape[0]).contiguous()
        of_x = product(rows, weight.t()).view(x.shape) if ctx.needs_input_grad[0] else None
        of_weight = _of_weight(rows, x.reshape(rows.shape[0], -1)) if ctx.needs_input_grad[1] else None
        of_bias = rows.sum(0) if ctx.needs_input_grad[2] else None
        return of_x, of_weight, of_bias, None


def _of_weight(rows: Tensor, x: Tensor) -> Tensor:
    """(t, n), (t, k) -> rows.T @ x, (n, k)."""
    if rows.shape[1] > x.shape[1]:  # the narrower of the two is the cheaper one to turn
        return turned(_of_weight(x, rows))
    total = None
    for piece, inputs in zip(rows.split(_PIECE), x.split(_PIECE), strict=True):
        total = added(total, turned(piece), inputs)
    assert total is not None
    return total


def added(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """(n, t), (t, k) -> their product added to the total so far, (n, k)."""
    part = product(a, b.t())
    return part if total is None else total.add_(part)


def turned(x: Tensor) -> Tensor:
    """x.T, laid out in memory as oneDNN wants it. It would call torch's copy of a transposed matrix, which one thread
    does; the copy of three dimensions is another."""
    return x[None].transpose(1, 2).contiguous()[0]


class Linear(torch.nn.Linear):
    """A linear layer that takes this way where it is the faster one; elsewhere it is torch's."""

    careful = False

    def forward(self, x: Tensor) -> Tensor:
        if not ONEDNN or not float32_on_cpu(x):
            return super().forward(x)
        return _Product.apply(x, self.weight, self.bias, self.careful)


def float32_on_cpu(x: Tensor) -> bool:
    """Whether what is computed from x now is what this project's own functions for a CPU compute."""
    plain = torch.is_autocast_enabled("cpu") or torch.compiler.is_compiling()
    return x.device.type == "cpu" and x.dtype == torch.float32 and not plain
