"""The language-model head as the log-prob path uses it: hidden states and the tokens that follow -> their log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from src.linear import Linear, product

if TYPE_CHECKING:
    from torch import Tensor

# Logits held at once: this many positions times the vocabulary, in float32.
CHUNK = 1024


class _TokenLogps(torch.autograd.Function):
    """Logits exist a chunk of positions at a time, in the forward pass and, computed again, in the backward pass,
    where their memory becomes that of their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        logps, normalisers = [], []
        for h, t in zip(hidden.split(CHUNK), targets.split(CHUNK), strict=True):
            logits = _logits(h, weight, bias, ctx.dtype)
            chosen = logits.gather(1, t[:, None])[:, 0]
            largest = logits.amax(1)
            normaliser = logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest)
            logps.append(chosen - normaliser)
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        of_hidden, of_weight, of_bias = [], None, None
        pieces = (x.split(CHUNK) for x in (hidden, targets, normalisers, gradients[0]))
        for h, t, normaliser, gradient in zip(*pieces, strict=True):
            # d log p(t) / d logits = one-hot(t) - softmax(logits)
            logits = _logits(h, weight, bias, ctx.dtype)
            logits.sub_(normaliser[:, None]).exp_().mul_(-gradient[:, None])
            logits.scatter_add_(1, t[:, None], gradient[:, None])
            narrow = logits.to(ctx.dtype)
            if ctx.needs_input_grad[0]:
                of_hidden.append(product(narrow, weight.to(ctx.dtype).t()).to(hidden.dtype))
            if ctx.needs_input_grad[1]:
                part = product(narrow.t(), h.to(ctx.dtype).t()).to(weight.dtype)
                of_weight = part if of_weight is None else of_weight.add_(part)
            if ctx.needs_input_grad[2]:
                of_bias = logits.sum(0) if of_bias is None else of_bias.add_(logits.sum(0))
        return torch.cat(of_hidden) if of_hidden else None, of_weight, of_bias, None


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, dtype: torch.dtype) -> Tensor:
    """(t, d), (vocabulary, d) -> (t, vocabulary), multiplied in `dtype`, in float32 at least."""
    logits = product(hidden.to(dtype), weight.to(dtype)).to(torch.promote_types(dtype, torch.float32))
    return logits if bias is None else logits.add_(bias)


class Head(Linear):
    """A linear head that can be asked for log-probs instead of logits."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., vocabulary) logits; with targets (t,) int64 and x (t, d): (t,) float32 log-probs, nats."""
        if targets is None:
            return super().forward(x)
        return _TokenLogps.apply(x, self.weight, self.bias, targets)
