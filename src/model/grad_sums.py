"""Gradients of bf16 weights, summed in float32 over the micro-batches of a step by the products that compute them.

By itself autograd rounds the gradient of a bf16 weight to bf16 in every micro-batch, and the engine reads it again to
add it to a float32 sum. Here a product adds to that sum directly what it accumulates in float32 anyway.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import embedding, linear


def add_product(total: Tensor | None, a: Tensor, b: Tensor) -> Tensor:
    """Return total + a @ b of a (n, t) and b (t, k), at least float32, where `total` is if there is one."""
    if a.device.type == "cuda" and a.dtype in (torch.bfloat16, torch.float16):
        if total is None:
            return torch.mm(a, b, out_dtype=torch.float32)
        return torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    with torch.autocast(a.device.type, enabled=False):
        a, b = (x.to(torch.promote_types(x.dtype, torch.float32)) for x in (a, b))
        return a @ b if total is None else total.addmm_(a, b)


class GradSum:
    """The gradient of a float32 weight in whose place a rounded copy computes; the copy has it as `grad_sum`."""

    def __init__(self, weight: torch.nn.Parameter) -> None:
        self.weight = weight

    def add(self, gradient: Tensor) -> None:
        if self.weight.grad is None:
            self.weight.grad = gradient.to(self.weight.dtype)
        else:
            self.weight.grad.add_(gradient)

    def add_product(self, a: Tensor, b: Tensor) -> None:
        """Add a @ b."""
        self.weight.grad = add_product(self.weight.grad, a, b)

    def add_rows(self, index: Tensor, rows: Tensor) -> None:
        """Add rows (t, width), at least float32, to those of these indices (t,)."""
        if self.weight.grad is None:
            self.weight.grad = torch.zeros_like(self.weight)
        self.weight.grad.index_add_(0, index, rows)


def grad_sum_of(weight: Tensor) -> GradSum | None:
    """Return where gradients of this weight are summed; None: autograd returns them."""
    return getattr(weight, "grad_sum", None)


class _Linear(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, grad_sum: GradSum) -> Tensor:
        ctx.save_for_backward(x, weight)
        ctx.grad_sum = grad_sum
        return linear(x, weight, bias)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        x, weight = ctx.saved_tensors
        grad = grad_outputs[0].flatten(0, -2)
        ctx.grad_sum.add_product(grad.t(), x.flatten(0, -2))
        grad_x = (grad @ weight).view(x.shape) if ctx.needs_input_grad[0] else None
        return grad_x, None, grad.sum(0) if ctx.needs_input_grad[2] else None, None


class SummingLinear(torch.nn.Linear):
    """A linear layer that adds the gradient of its weight to the weight's sum."""

    def forward(self, x: Tensor) -> Tensor:
        if (grad_sum := grad_sum_of(self.weight)) is None:  # a frozen weight
            return super().forward(x)
        return _Linear.apply(x.to(self.weight.dtype), self.weight, self.bias, grad_sum)


class SummingEmbedding(torch.autograd.Function):
    """Rows of a weight as float32; their gradient is added to those rows of the weight's sum."""

    @staticmethod
    def forward(ctx: Any, ids: Tensor, weight: Tensor, padding_idx: int | None, grad_sum: GradSum) -> Tensor:
        ctx.save_for_backward(ids)
        ctx.padding_idx, ctx.grad_sum = padding_idx, grad_sum
        return embedding(ids, weight).float()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[None, ...]:
        ids, rows = ctx.saved_tensors[0].flatten(), grad_outputs[0].flatten(0, -2)
        if ctx.padding_idx is not None:  # whose row has no gradient in torch
            rows = rows.masked_fill((ids == ctx.padding_idx)[:, None], 0.0)
        ctx.grad_sum.add_rows(ids, rows)
        return None, None, None, None
