"""What a decoder's layers do here beside their linear layers: the same values as transformers', at less cost."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
from torch.autograd.function import once_differentiable

if TYPE_CHECKING:
    from torch import Tensor

# Those of transformers that are the same module under other names.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def prepare_layers(model: Any) -> None:
    """Norms and the last layer of a transformers decoder learn theirs, in place. Families unknown here stay as they
    are: slower, not wrong."""
    for module in model.modules():
        if type(module).__name__ in {f"{family}RMSNorm" for family in _FAMILIES}:
            module.__class__ = _subclass(type(module), RMSNorm)  # type: ignore[arg-type]
        if type(module).__name__ in {f"{family}Model" for family in _FAMILIES}:
            last = module.layers[-1]
            if not isinstance(last, LastLayer):
                last.__class__ = _subclass(type(last), LastLayer)  # type: ignore[arg-type]


@cache
def _subclass(base: type, extension: type) -> type:
    return type(f"{extension.__name__}Of{base.__name__}", (extension, base), {})


class RMSNorm(torch.nn.Module):
    """x / rms(x) * weight, over the last dimension."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        x, weight = hidden_states, self.weight
        plain = x.device.type != "cpu" or torch.compiler.is_compiling()
        if plain or x.dtype != torch.float32 or weight.dtype != torch.float32:
            return super().forward(x)
        return _RMSNorm.apply(x, weight, self.variance_epsilon)


class _RMSNorm(torch.autograd.Function):
    """On a CPU, where it is memory that takes the time: few passes, and nothing kept but x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        norm = torch.linalg.vector_norm(x, dim=-1, keepdim=True)
        inverse = norm.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
        ctx.save_for_backward(x, weight, inverse)
        return (x * inverse).mul_(weight)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, inverse = ctx.saved_tensors
        gradient, normed = gradients[0], x * inverse
        product = gradient * normed
        of_weight = product.flatten(0, -2).sum(0) if ctx.needs_input_grad[1] else None
        # d x / rms: what changes the rms is taken out again.
        along = (product @ weight)[..., None].div_(x.shape[-1])
        return torch.addcmul(normed.mul_(along), gradient, weight, value=-1).mul_(-inverse), of_weight, None


class LastLayer(torch.nn.Module):
    """A decoder's last layer, asked for some positions only: all the others are there for attention alone."""

    input_layernorm: torch.nn.Module
    self_attn: torch.nn.Module
    post_attention_layernorm: torch.nn.Module
    mlp: torch.nn.Module

    def forward(self, hidden_states: Tensor, *, only: Tensor | None = None, **kwargs: Any) -> Tensor:
        """(1, n, width); with `only` (t,) int64: (1, t, width)."""
        if only is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = (hidden_states + attended)[:, only]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))
