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

# Decoders of transformers that liger-kernel supports, whose two norms of a layer and the last one feed products, whose
# MLP is SwiGLU, and which rotate whole heads. Others keep their modules.
_FAMILIES = ("Granite", "Llama", "Ministral", "Mistral", "Qwen2", "Qwen3", "SmolLM3")
_NORMS = ("input_layernorm", "post_attention_layernorm", "norm")  # not those of queries and keys


class _Fused:
    """The base of all swapped modules."""

    unfused: ClassVar[type]  # the class of transformers


class FusedRMSNorm(_Fused):
    """An RMSNorm that returns what the next product multiplies: bf16 under autocast, of a float32 residual stream."""

    weight: Tensor
    variance_epsilon: float

    def forward(self, hidden_states: Tensor) -> Tensor:
        device = hidden_states.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else hidden_states.dtype
        return RMSNormFunction.apply(hidden_states, self.weight, self.variance_epsilon, dtype)


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
    for name, module in model.named_modules():
        upstream: Any = type(module)  # a class is hashable, which mypy does not see
        if isinstance(module, _Fused):
            if not fused:
                module.__class__ = type(module).unfused
        elif fused and (cls := _fused(upstream)) is not None and _is_fusible(module, name, cls):
            module.__class__ = cls


def _is_fusible(module: Any, name: str, cls: type) -> bool:
    if issubclass(cls, FusedRMSNorm):
        return name.rpartition(".")[2] in _NORMS
    return not issubclass(cls, FusedMLP) or module.config.hidden_act in ("silu", "swish")
