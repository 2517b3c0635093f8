"""The language-model head of the log-prob path: hidden states and target tokens -> log-probs, without whole logits.

Products multiply in the precision of the computation and write float32: logits are never rounded to bf16, nor are sums
over chunks. The softmax is float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.functional import linear

from src.model.grad_sums import add_product, grad_sum_of
from src.planning.fit import head_rows

KL_CHUNK = 128  # rows at once on a CPU where several tensors of logits exist beside each other


def token_chunk(vocab_size: int, device: torch.device) -> int:
    """Return the number of rows whose logits exist at once on the device."""
    is_cuda = device.type == "cuda"
    return head_rows(vocab_size, torch.cuda.get_device_properties(device).total_memory if is_cuda else 0)


def product_dtype(hidden: Tensor) -> torch.dtype:
    """Return the dtype in which products of `hidden` are multiplied."""
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def product_nt(a: Tensor, b: Tensor) -> Tensor:
    """Return a @ b.T of a (t, k) and b (n, k), accumulated and written in float32 where they have less."""
    if torch.promote_types(a.dtype, torch.float32) == a.dtype:
        return linear(a, b)
    if a.device.type == "cuda":
        return torch.mm(a, b.t(), out_dtype=torch.float32)
    with torch.autocast(a.device.type, enabled=False):
        return linear(a.float(), b.float())


def _add_bias(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits.add_(bias)


class _TokenLogps(torch.autograd.Function):
    """Log-probs from logits that exist for one chunk of positions at a time; the backward pass computes them again.

    Besides products a chunk's logits are read by three kernels: log-softmax, and softmax and its product with the
    gradient on the way back.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.dtype, ctx.rows = product_dtype(hidden), token_chunk(len(weight), hidden.device)
        ctx.grad_sum = grad_sum_of(weight)
        ctx.save_for_backward(hidden, weight, bias, targets)
        weight_cast = weight.to(ctx.dtype)
        logps = [
            _add_bias(product_nt(h, weight_cast), bias).log_softmax(1).gather(1, t[:, None]).squeeze(1)
            for h, t in zip(hidden.to(ctx.dtype).split(ctx.rows), targets.split(ctx.rows), strict=True)
        ]
        return torch.cat(logps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets = ctx.saved_tensors
        weight_cast = weight.to(ctx.dtype)
        grad_hidden: list[Tensor] = []
        grad_weight = grad_bias = None
        needs_hidden, needs_weight, needs_bias, _ = ctx.needs_input_grad
        chunks = (x.split(ctx.rows) for x in (hidden.to(ctx.dtype), targets, grad_outputs[0]))
        for h, t, grad in zip(*chunks, strict=True):
            # d log p(t) / d logits = one-hot(t) - softmax(logits)
            difference = _add_bias(product_nt(h, weight_cast), bias).softmax(1)
            difference.scatter_add_(1, t[:, None], grad.new_full((len(t), 1), -1.0))
            # Rounded as it is written, without a copy in float32.
            grad_logits = torch.mul(difference, -grad[:, None], out=torch.empty_like(difference, dtype=ctx.dtype))
            del difference
            if needs_hidden:
                grad_hidden.append(product_nt(grad_logits, weight_cast.t()).to(hidden.dtype))
            if needs_weight and ctx.grad_sum is not None:
                ctx.grad_sum.add_product(grad_logits.t(), h)
            elif needs_weight:
                grad_weight = add_product(grad_weight, grad_logits.t(), h)
            if needs_bias:
                total = grad_logits.sum(0, dtype=grad.dtype)
                grad_bias = total if grad_bias is None else grad_bias.add_(total)
        return (
            torch.cat(grad_hidden) if needs_hidden else None,
            None if grad_weight is None else grad_weight.to(weight.dtype),
            None if grad_bias is None else grad_bias.to(bias.dtype),
            None,
        )


class Head(torch.nn.Linear):
    """A linear head that returns logits, or the log-probs of given targets."""

    @staticmethod
    def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
        """Return what a product in `dtype` multiplies."""
        return x.to(dtype)

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        """Return a @ b.T of two operands, at least float32."""
        return product_nt(a, b)

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return (..., vocabulary) logits; with targets (t,) int64 and x (t, d): (t,) float32 log-probs in nats."""
        if targets is not None:
            return self.token_logps(x, targets)
        if x.device.type != "cuda":
            return super().forward(x)
        # Samples are drawn from the float32 logits that their log-probs are computed from.
        dtype = product_dtype(x)
        logits = product_nt(x.reshape(-1, x.shape[-1]).to(dtype), self.weight.to(dtype))
        return _add_bias(logits, self.bias).view(*x.shape[:-1], -1)

    def token_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _TokenLogps.apply(hidden, self.weight, self.bias, targets)


@torch.no_grad()
def next_token_kl(head: Head, hidden: Tensor, other_head: Head, other_hidden: Tensor) -> Tensor:
    """Return the KL divergence of the next-token distribution from the other model's at every position, nats.

    hidden: (t, d); other_hidden: (t, d of the other model). A sum over the whole vocabulary, (t,) float32 and never
    negative.
    """
    dtype = product_dtype(hidden)
    weight, other_weight = (h.operand(h.weight, dtype) for h in (head, other_head))
    # Fewer rows on a GPU would take as long, because each chunk reads both weights.
    rows = token_chunk(len(weight), hidden.device) // 4 if hidden.device.type == "cuda" else KL_CHUNK
    chunks = (head.operand(h, dtype).split(rows) for h in (hidden, other_hidden))
    divergences = []
    for h, other_h in zip(*chunks, strict=True):
        log_p = _add_bias(head.product(h, weight), head.bias).log_softmax(1)
        log_q = _add_bias(other_head.product(other_h, other_weight), other_head.bias).log_softmax(1)
        difference = torch.sub(log_p, log_q, out=log_q)
        # Rounding can make a divergence of nearly zero negative.
        divergences.append(log_p.exp_().mul_(difference).sum(1).clamp(min=0))
    return torch.cat(divergences)
