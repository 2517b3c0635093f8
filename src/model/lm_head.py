"""The language-model head as the log-prob path uses it: hidden states and the tokens that follow -> their log-probs."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch

from src.model.cpu.linear import Linear, product

if TYPE_CHECKING:
    from torch import Tensor

# Logits held at once, in float32: this many positions times, on a CPU, this much of the vocabulary, which stays in its
# cache; elsewhere times all of it.
TOKEN_CHUNK = 1024
VOCAB_CHUNK = 2048


class _TokenLogps(torch.autograd.Function):
    """Logits exist a chunk of positions and a slab of the vocabulary at a time, in the forward pass and, computed
    again, in the backward pass, where their memory becomes that of their gradient."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor, bias: Tensor | None, targets: Tensor) -> Tensor:
        device = hidden.device.type
        ctx.dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden.dtype
        narrow, slabs = weight.to(ctx.dtype), _slabs(weight)
        logps, normalisers = [], []
        for h, t in zip(hidden.to(ctx.dtype).split(TOKEN_CHUNK), targets.split(TOKEN_CHUNK), strict=True):
            chosen, sums = torch.zeros_like(t, dtype=torch.promote_types(ctx.dtype, torch.float32)), []
            for slab in slabs:
                logits = _logits(h, narrow, bias, slab)
                inside, place = _found(t, slab)
                chosen = torch.where(inside, logits.gather(1, place[:, None])[:, 0], chosen)
                largest = logits.amax(1)
                sums.append(logits.sub_(largest[:, None]).exp_().sum(1).log_().add_(largest))
            normaliser = torch.stack(sums).logsumexp(0)
            logps.append(chosen - normaliser)
            normalisers.append(normaliser)
        ctx.save_for_backward(hidden, weight, bias, targets, torch.cat(normalisers))
        return torch.cat(logps)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, targets, normalisers = ctx.saved_tensors
        narrow, slabs = weight.to(ctx.dtype), _slabs(weight)
        of_hidden, of_weight, of_bias = (
            torch.zeros_like(x, dtype=normalisers.dtype) if x is not None and needed else None
            for x, needed in zip((hidden, weight, bias), ctx.needs_input_grad, strict=False)
        )
        starts = range(0, len(hidden), TOKEN_CHUNK)
        pieces = (x.split(TOKEN_CHUNK) for x in (hidden.to(ctx.dtype), targets, normalisers, gradients[0]))
        for start, h, t, normaliser, gradient in zip(starts, *pieces, strict=True):
            for slab in slabs:
                # d log p(t) / d logits = one-hot(t) - softmax(logits)
                logits = _logits(h, narrow, bias, slab)
                logits.sub_(normaliser[:, None]).exp_().mul_(-gradient[:, None])
                inside, place = _found(t, slab)
                logits.scatter_add_(1, place[:, None], (gradient * inside)[:, None])
                cast = logits.to(ctx.dtype)
                if of_hidden is not None:
                    of_hidden[start : start + TOKEN_CHUNK] += product(cast, narrow[slab].t())
                if of_weight is not None:
                    of_weight[slab] += product(cast.t(), h.t())
                if of_bias is not None:
                    of_bias[slab] += logits.sum(0)
        like = ((of_hidden, hidden), (of_weight, weight), (of_bias, bias))
        return *(None if x is None else x.to(its.dtype) for x, its in like), None


def _slabs(weight: Tensor) -> list[slice]:
    vocabulary = weight.shape[0]
    width = VOCAB_CHUNK if weight.device.type == "cpu" else vocabulary
    return [slice(start, min(start + width, vocabulary)) for start in range(0, vocabulary, width)]


def _logits(hidden: Tensor, weight: Tensor, bias: Tensor | None, slab: slice) -> Tensor:
    """(t, d), (vocabulary, d) -> (t, slab), multiplied as they are, in float32 at least from then on."""
    logits = product(hidden, weight[slab])
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32))
    return logits if bias is None else logits.add_(bias[slab])


def _found(targets: Tensor, slab: slice) -> tuple[Tensor, Tensor]:
    """Which targets lie in the slab, and where in it; those that do not: somewhere."""
    inside = (targets >= slab.start) & (targets < slab.stop)
    return inside, (targets - slab.start).clamp(0, slab.stop - slab.start - 1)


class Head(Linear):
    """A linear head that can be asked for log-probs instead of logits."""

    def forward(self, x: Tensor, targets: Tensor | None = None) -> Tensor:
        """(..., d) -> (..., vocabulary) logits; with targets (t,) int64 and x (t, d): (t,) float32 log-probs, nats."""
        if targets is None:
            return super().forward(x)
        return _TokenLogps.apply(x, self.weight, self.bias, targets)
