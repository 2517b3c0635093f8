"""Models whose RMSNorm, RoPE and SwiGLU are one kernel each (`src.model.fused_ops`): on CUDA, where it can be.

Modules are swapped in one model, by changing `__class__`, so that others of the process stay as they are;
liger-kernel's own patch would replace functions of transformers' modules, for models on a CPU too.
"""

from __future__ import annotations

import inspect
from functools import cache
from types import FunctionType
from typing import Any, ClassVar

import torch
from torch import Tensor

from src.model.fused_ops import RMSNormFunction, RotaryFunction, SwiGLUFunction
from src.model.lm_head import product_dtype

# Decoders of transformers that liger-kernel supports, whose two norms of a layer and the last one feed products, whose
# MLP is SwiGLU, and which rotate whole heads. Others keep their modules.
_FAMILIES = ("Granite", "Llama", "Ministral", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
# Granite scales the branches of a layer.
_LAYERS = tuple(f"{family}DecoderLayer" for family in _FAMILIES if family != "Granite")
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")  # not those of queries and keys


class _Fused:
    """The base of all swapped modules."""

    unfused: ClassVar[type]  # the class of transformers


class FusedRMSNorm(_Fused, torch.nn.Module):
    """An RMSNorm that returns what the next product multiplies: bf16 under autocast, of a float32 residual stream."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor, branch: Tensor | None = None, with_stream: bool = False) -> Any:
        """Return the norm of hidden_states + branch; with_stream: after that sum, with which the stream goes on."""
        dtype = product_dtype(hidden_states)
        stream, normed = RMSNormFunction.apply(hidden_states, branch, self.weight, self.variance_epsilon, dtype)
        return (stream, normed) if with_stream else normed


class FusedDecoderLayer(_Fused):
    """A decoder layer of two residual branches."""

    input_layernorm: FusedRMSNorm
    self_attn: torch.nn.Module
    post_attention_layernorm: FusedRMSNorm
    mlp: torch.nn.Module

    def forward(self, hidden_states: Tensor, **kwargs: Any) -> Tensor:
        stream, normed = self.input_layernorm(hidden_states, with_stream=True)
        attended, _ = self.self_attn(hidden_states=normed, **kwargs)
        stream, normed = self.post_attention_layernorm(stream, attended, with_stream=True)
        return stream + self.mlp(normed)


class FusedMLP(_Fused):
    """A gated MLP with SwiGLU."""

    gate_proj: torch.nn.Module
    up_proj: torch.nn.Module
    down_proj: torch.nn.Module

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(SwiGLUFunction.apply(self.gate_proj(x), self.up_proj(x)))


def _rotary(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    return RotaryFunction.apply(query, key, cos, sin)


@cache
def _fused(cls: type) -> type | None:
    """Return the fused subclass of a module's class, or None."""
    if cls.__name__ in _LAYERS:
        return type(f"Fused{cls.__name__}", (FusedDecoderLayer, cls), {"unfused": cls})
    family = next((f for f in _FAMILIES if cls.__name__ in (f"{f}RMSNorm", f"{f}MLP", f"{f}Attention")), None)
    if family is None:
        return None
    kind = cls.__name__.removeprefix(family)
    if kind != "Attention":
        base = FusedRMSNorm if kind == "RMSNorm" else FusedMLP
        return type(f"Fused{cls.__name__}", (base, cls), {"unfused": cls})
    # Attention is transformers' own code, in which one name stands for another function.
    forward: Any = inspect.unwrap(cls.forward)  # type: ignore[attr-defined]
    if "apply_rotary_pos_emb" not in forward.__code__.co_names:
        return None
    names = forward.__globals__ | {"apply_rotary_pos_emb": _rotary}
    rebound = FunctionType(forward.__code__, names, forward.__name__, forward.__defaults__, forward.__closure__)
    rebound.__kwdefaults__ = forward.__kwdefaults__
    return type(f"Fused{cls.__name__}", (_Fused, cls), {"forward": rebound, "unfused": cls})


def set_fused_(model: Any, fused: bool) -> None:
    """Swap the modules of a model to fused ones or back, in place. Parameters and their names do not change."""
    if getattr(model, "_is_fused", False) == fused:  # called in every forward pass
        return
    model._is_fused = fused
    for name, module in model.named_modules():
        upstream: Any = type(module)  # a class is hashable, which mypy does not see
        if issubclass(upstream, _Fused):
            if not fused:
                module.__class__ = upstream.unfused
        elif fused and (cls := _fused(upstream)) is not None and _is_fusible(module, name, cls):
            module.__class__ = cls


def _is_fusible(module: Any, name: str, cls: type) -> bool:
    if issubclass(cls, FusedRMSNorm):
        return name.rpartition(".")[2] in _NORMS
    return not issubclass(cls, FusedMLP) or module.config.hidden_act in ("silu", "swish")
