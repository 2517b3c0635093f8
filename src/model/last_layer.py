"""What a decoder's layers do here around their linear layers: the same values as transformers', at less cost."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.autograd.function import once_differentiable

from src.model.cpu.linear import Linear, added, float32_on_cpu, product, turned

if TYPE_CHECKING:
    from torch import Tensor

# Rows at once, measured: fewer cost more calls, more leave the cache.
_NORM_ROWS = 512
_MLP_ROWS = 1024

# Layers whose products are careful. What the first ones round, all others carry on: there the hidden state of the first
# token grows to many times the others', and all attend to it. In SmolLM2, of 30 layers, most of the rounding of a
# gradient was of the forward products of these three.
_CAREFUL = 3

# Those of transformers that are the same module under other names.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


def prepare_layers(model: Any) -> None:
    """Norms, MLPs and the last layer of a transformers decoder learn theirs, in place. Families unknown here stay as
    they are: slower, not wrong."""
    for module in model.modules():
        if type(module).__name__ in {f"{family}MLP" for family in _FAMILIES}:
            module.__class__ = _subclass(type(module), GatedMLP)  # type: ignore[arg-type]
        if type(module).__name__ in {f"{family}RMSNorm" for family in _FAMILIES}:
            module.__class__ = _subclass(type(module), RMSNorm)  # type: ignore[arg-type]
        if type(module).__name__ in {f"{family}Model" for family in _FAMILIES}:
            for part in module.layers[:_CAREFUL].modules():
                if isinstance(part, Linear):
                    part.careful = True
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
    """On a CPU, where it is memory that takes the time: some rows after the others, and nothing kept but x."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        inverse = rows.new_empty(len(rows), 1)
        pieces = (tensor.split(_NORM_ROWS) for tensor in (rows, inverse, out))
        for piece, own, to in zip(*pieces, strict=True):
            torch.linalg.vector_norm(piece, dim=1, keepdim=True, out=own)
            own.square_().div_(x.shape[-1]).add_(epsilon).rsqrt_()
            torch.mul(piece, own, out=to).mul_(weight)
        ctx.save_for_backward(rows, weight, inverse)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, weight, inverse = ctx.saved_tensors
        of_x, of_weight = torch.empty_like(rows), torch.zeros_like(weight)
        pieces = (x.split(_NORM_ROWS) for x in (rows, inverse, gradients[0].reshape(rows.shape), of_x))
        for piece, own, gradient, to in zip(*pieces, strict=True):
            normed = piece * own
            by_weight = gradient * normed
            of_weight += by_weight.sum(0)
            # d x / rms: what changes the rms is taken out again.
            along = (by_weight @ weight)[:, None].div_(rows.shape[1])
            torch.addcmul(normed.mul_(along), gradient, weight, value=-1, out=to).mul_(-own)
        return of_x.view(gradients[0].shape), of_weight if ctx.needs_input_grad[1] else None, None


class GatedMLP(torch.nn.Module):
    """down(silu(gate(x)) * up(x))"""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module
    act_fn: torch.nn.Module

    def forward(self, x: Tensor) -> Tensor:
        parts = self.gate_proj, self.up_proj, self.down_proj
        # Adapters, a bias or weights that ZeRO-3 gathers when their own module is called: one call after the other.
        whole = all(type(p) is Linear and p.bias is None and not hasattr(p.weight, "ds_id") for p in parts)
        if not whole or type(self.act_fn).__name__ not in ("SiLU", "SiLUActivation") or not float32_on_cpu(x):
            return super().forward(x)
        careful = any(p.careful for p in parts)
        return _GatedMLP.apply(x, *(p.weight for p in parts), torch.is_grad_enabled(), careful)


class _GatedMLP(torch.autograd.Function):
    """On a CPU, some rows after the others: what is between the three products stays in the cache. Kept are gate and
    up alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, gate: Tensor, up: Tensor, down: Tensor, keep: bool, careful: bool) -> Tensor:
        rows = x.reshape(-1, x.shape[-1])
        out = torch.empty_like(rows)
        kept: list[Tensor] = []
        for piece, to in zip(rows.split(_MLP_ROWS), out.split(_MLP_ROWS), strict=True):
            gates, ups = (product(piece, weight, careful=careful) for weight in (gate, up))
            to.copy_(product(F.silu(gates).mul_(ups), down, careful=careful))
            kept += [gates, ups] if keep else []
        ctx.save_for_backward(rows, gate, up, down, *kept)
        return out.view(x.shape)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        rows, gate, up, down, *kept = ctx.saved_tensors
        gradient, of_x = gradients[0].reshape(rows.shape), torch.empty_like(rows)
        of_gate = of_up = of_down = None  # the first two turned: of two sides the narrower one is the cheaper to turn
        pieces = (x.split(_MLP_ROWS) for x in (rows, gradient, of_x))
        for piece, of_out, to, gates, ups in zip(*pieces, kept[::2], kept[1::2], strict=True):
            of_hidden = product(of_out, down.t())
            hidden = F.silu(gates)
            of_ups = of_hidden * hidden
            of_gates = torch.ops.aten.silu_backward(of_hidden.mul_(ups), gates)
            torch.add(product(of_ups, up.t()), product(of_gates, gate.t()), out=to)
            if ctx.needs_input_grad[3]:
                of_down = added(of_down, turned(of_out), hidden.mul_(ups))
            if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
                across = turned(piece)
                of_gate, of_up = added(of_gate, across, of_gates), added(of_up, across, of_ups)
        of_gate, of_up = (None if total is None else turned(total) for total in (of_gate, of_up))
        return of_x.view(gradients[0].shape), of_gate, of_up, of_down, None, None


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
