"""The last decoder layer, which computes its MLP only where a response token is predicted."""

from __future__ import annotations

from functools import cache
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from torch import Tensor

# Model families of transformers whose decoder layer is the one below; others keep theirs: correct, only slower.
_FAMILIES = ("Llama", "Mistral", "Qwen2", "Qwen3")


class SparseOutputLayer(torch.nn.Module):
    """A decoder layer that returns some positions only; the others matter to attention alone."""

    input_layernorm: torch.nn.Module
    self_attn: torch.nn.Module
    post_attention_layernorm: torch.nn.Module
    mlp: torch.nn.Module

    def forward(self, hidden_states: Tensor, *, output_positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return (1, n, width); with output_positions (t,) int64: (1, t, width)."""
        if output_positions is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = (hidden_states + attended)[:, output_positions]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


def patch_last_layer_(model: Any) -> None:
    """Make the last layer of a known decoder a SparseOutputLayer, in place, by changing `__class__`."""
    for module in model.modules():
        if type(module).__name__ in {f"{family}Model" for family in _FAMILIES}:
            last = module.layers[-1]
            if not isinstance(last, SparseOutputLayer):
                last.__class__ = _sparse_output(type(last))  # type: ignore[arg-type]


@cache
def _sparse_output(layer: type) -> Any:
    return type(f"SparseOutput{layer.__name__}", (SparseOutputLayer, layer), {})
