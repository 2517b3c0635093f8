"""The language-model head on a CPU: logits in chunks of positions and vocabulary, which stay in the cache."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from src.model.cpu.linear import OneDNNLinear, mm_nt
from src.model.grad_sums import grad_sum_of
from src.model.lm_head import Head, product_dtype

# The largest block of logits is TOKEN_CHUNK rows times VOCAB_CHUNK columns.
TOKEN_CHUNK = 1024
VOCAB_CHUNK = 2048


class _ChunkedTokenLogps(torch.autograd.Function):
    """Log-probs from logits that exist one chunk of positions and vocabulary at a time.

    The backward pass computes each chunk again and overwrites it with its gradient. In bf16 operands are rounded and
    multiplied in float32, which is what products are on a GPU that multiply bf16 and write float32.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        ctx.dtype, ctx.vocab_chunks = product_dtype(hidden), _vocab_chunks(len(weight))
        ctx.grad_sum = grad_sum_of(weight)
        hidden_rounded, weight_rounded = _round(hidden, ctx.dtype), _round(weight, ctx.dtype)
        logps, lses = [], []
        for h, t in zip(hidden_rounded.split(TOKEN_CHUNK), targets.split(TOKEN_CHUNK), strict=True):
            target_logits = torch.zeros_like(t, dtype=h.dtype)
            lse_chunks = []
            for chunk in ctx.vocab_chunks:
                logits = _logits(h, weight_rounded, bias, chunk)
                inside, index = _targets_in_chunk(t, chunk)
                target_logits = torch.where(inside, logits.gather(1, index[:, None])[:, 0], target_logits)
                row_max = logits.amax(1)
                lse_chunks.append(logits.sub_(row_max[:, None]).exp_().sum(1).log_().add_(row_max))
            lse = torch.stack(lse_chunks).logsumexp(0)
            logps.append(target_logits - lse)
            lses.append(lse)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(lses))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, lses = ctx.saved_tensors
        weight_rounded = _round(weight, ctx.dtype)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(x, dtype=lses.dtype) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        starts = range(0, len(hidden), TOKEN_CHUNK)
        token_chunks = (x.split(TOKEN_CHUNK) for x in (_round(hidden, ctx.dtype), targets, lses, grad_outputs[0]))
        for start, h, t, lse, grad in zip(starts, *token_chunks, strict=True):
            for chunk in ctx.vocab_chunks:
                # d log p(t) / d logits = one-hot(t) - softmax(logits)
                logits = _logits(h, weight_rounded, bias, chunk)
                grad_logits = logits.sub_(lse[:, None]).exp_().mul_(-grad[:, None])
                inside, index = _targets_in_chunk(t, chunk)
                grad_logits.scatter_add_(1, index[:, None], (grad * inside)[:, None])
                grad_rounded = _round(grad_logits, ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + TOKEN_CHUNK] += mm_nt(grad_rounded, weight_rounded[chunk].t())
                if grad_weight is not None:
                    grad_weight[chunk] += mm_nt(grad_rounded.t(), h.t())
                if grad_bias is not None:
                    grad_bias[chunk] += grad_logits.sum(0)
        if ctx.grad_sum is not None and grad_weight is not None:
            ctx.grad_sum.add(grad_weight)
            grad_weight = None
        grads = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        return *(None if grad is None else grad.to(x.dtype) for grad, x in grads), None


def _round(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Round to `dtype`; return float32 of what is less than that."""
    return x.to(dtype).to(torch.promote_types(dtype, torch.float32))


def _vocab_chunks(vocab_size: int) -> list[slice]:
    return [slice(start, min(start + VOCAB_CHUNK, vocab_size)) for start in range(0, vocab_size, VOCAB_CHUNK)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: slice) -> Tensor:
    """Return (t, chunk) logits of hidden (t, d) and weight (vocabulary, d)."""
    logits = mm_nt(hidden, weight[chunk])
    return logits if bias is None else logits.add_(bias[chunk])


def _targets_in_chunk(targets: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Return the mask of targets inside the vocabulary chunk, and their index in it (clamped for the others)."""
    inside = (targets >= chunk.start) & (targets < chunk.stop)
    return inside, (targets - chunk.start).clamp(0, chunk.stop - chunk.start - 1)


class OneDNNHead(Head, OneDNNLinear):
    """A head that multiplies through oneDNN, in float32 what is rounded to less."""

    @staticmethod
    def operand(x: Tensor, dtype: torch.dtype) -> Tensor:
        return _round(x, dtype)

    @staticmethod
    def product(a: Tensor, b: Tensor) -> Tensor:
        return mm_nt(a, b)

    def token_logps(self, hidden: Tensor, targets: Tensor) -> Tensor:
        return _ChunkedTokenLogps.apply(hidden, self.weight, self.bias, targets)
