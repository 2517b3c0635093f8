"""The language-model head of the log-prob path: hidden states and target tokens -> log-probs, without whole logits."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, ClassVar

import torch
from torch import Tensor
from torch.nn.functional import linear

# The largest block of float32 logits is TOKEN_CHUNK rows times the vocabulary, or times the head's vocab_chunk.
TOKEN_CHUNK = 1024
KL_CHUNK = 128  # rows at once where several tensors of logits exist beside each other


class _TokenLogps(torch.autograd.Function):
    """Log-probs from logits that exist one chunk of positions and vocabulary at a time.

    The backward pass computes each chunk again and overwrites it with its gradient.
    """

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor, head: Head) -> Tensor:
        ctx.dtype = _matmul_dtype(hidden)
        ctx.matmul_nt, ctx.vocab_chunks = head.matmul_nt, _vocab_chunks(len(weight), head.vocab_chunk)
        weight_cast = weight.to(ctx.dtype)
        logps, lses = [], []
        for h, t in zip(hidden.to(ctx.dtype).split(TOKEN_CHUNK), targets.split(TOKEN_CHUNK), strict=True):
            target_logits = torch.zeros_like(t, dtype=torch.promote_types(ctx.dtype, torch.float32))
            lse_chunks = []
            for chunk in ctx.vocab_chunks:
                logits = _logits(ctx.matmul_nt, h, weight_cast, bias, chunk)
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
        weight_cast = weight.to(ctx.dtype)
        grad_hidden, grad_weight, grad_bias = (
            torch.zeros_like(x, dtype=lses.dtype) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        starts = range(0, len(hidden), TOKEN_CHUNK)
        token_chunks = (x.split(TOKEN_CHUNK) for x in (hidden.to(ctx.dtype), targets, lses, grad_outputs[0]))
        for start, h, t, lse, grad in zip(starts, *token_chunks, strict=True):
            for chunk in ctx.vocab_chunks:
                # d log p(t) / d logits = one-hot(t) - softmax(logits)
                logits = _logits(ctx.matmul_nt, h, weight_cast, bias, chunk)
                grad_logits = logits.sub_(lse[:, None]).exp_().mul_(-grad[:, None])
                inside, index = _targets_in_chunk(t, chunk)
                grad_logits.scatter_add_(1, index[:, None], (grad * inside)[:, None])
                grad_cast = grad_logits.to(ctx.dtype)
                if grad_hidden is not None:
                    grad_hidden[start : start + TOKEN_CHUNK] += ctx.matmul_nt(grad_cast, weight_cast[chunk].t())
                if grad_weight is not None:
                    grad_weight[chunk] += ctx.matmul_nt(grad_cast.t(), h.t())
                if grad_bias is not None:
                    grad_bias[chunk] += grad_logits.sum(0)
        grads = ((grad_hidden, hidden), (grad_weight, weight), (grad_bias, bias))
        return *(None if grad is None else grad.to(x.dtype) for grad, x in grads), None, None


def _matmul_dtype(hidden: Tensor) -> torch.dtype:
    device = hidden.device.type
    return torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype


def _vocab_chunks(vocab_size: int, width: int | None) -> list[slice]:
    width = width or vocab_size
    return [slice(start, min(start + width, vocab_size)) for start in range(0, vocab_size, width)]


def _logits(
    matmul_nt: Callable[..., Tensor], hidden: Tensor, weight: Tensor, bias: Tensor | None, chunk: slice
) -> Tensor:
    """Return (t, chunk) logits of hidden (t, d) and weight (vocabulary, d), float32 after the product."""
    logits = matmul_nt(hidden, weight[chunk])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits.add_(bias[chunk])


def _targets_in_chunk(targets: Tensor, chunk: slice) -> tuple[Tensor, Tensor]:
    """Return the mask of targets inside the vocabulary chunk, and their index in it (clamped for the others)."""
    inside = (targets >= chunk.start) & (targets < chunk.stop)
    return inside, (targets - chunk.start).clamp(0, chunk.stop - chunk.start - 1)


class Head(torch.nn.Linear):
    """A linear head that returns logits, or the log-probs of given targets."""

    matmul_nt: ClassVar[Callable[..., Tensor]] = staticmethod(linear)  # (t, k), (n, k) -> (t, n)
    vocab_chunk: int | None = None  # columns of logits at once; None: the whole vocabulary

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """Return (..., vocabulary) logits; with targets (t,) int64 and x (t, d): (t,) float32 log-probs in nats."""
        if targets is None:
            return super().forward(x)
        return _TokenLogps.apply(x, self.weight, self.bias, targets, self)


@torch.no_grad()
def next_token_kl(head: Head, hidden: Tensor, other_head: Head, other_hidden: Tensor) -> Tensor:
    """Return the KL divergence of the next-token distribution from the other model's at every position, nats.

    hidden: (t, d); other_hidden: (t, d of the other model). A sum over the whole vocabulary, (t,) float32 and never
    negative.
    """
    dtype = _matmul_dtype(hidden)
    weight, other_weight = head.weight.to(dtype), other_head.weight.to(dtype)

    def log_probs(head: Head, weight: Tensor, hidden: Tensor) -> Tensor:
        return _logits(head.matmul_nt, hidden.to(dtype), weight, head.bias, slice(None)).log_softmax(1)

    divergences = []
    for h, other_h in zip(hidden.split(KL_CHUNK), other_hidden.split(KL_CHUNK), strict=True):
        log_p, log_q = log_probs(head, weight, h), log_probs(other_head, other_weight, other_h)
        # Rounding can make a divergence of nearly zero negative.
        divergences.append((log_p.exp() * (log_p - log_q)).sum(1).clamp(min=0))
    return torch.cat(divergences)
