"""Keys and values of sampling in bf16, in blocks: a step writes its own tokens and copies no others."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

BLOCK = 256  # tokens by which a full buffer grows


class _BlockLayer(DynamicLayer):
    """Keys and values of one layer, (batch, kv_heads, tokens, d): the beginning of a buffer that has more room.

    transformers' own layer is concatenated anew at every step, and takes the dtype of the keys, which rotary embeddings
    of a float32 residual stream make float32.
    """

    is_initialized: bool
    _buffers: tuple[Tensor, ...]

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        """Append the keys and values of new tokens, rounded to bf16; return those of all tokens."""
        start, num_new = self.get_seq_length(), key_states.shape[-2]
        if not self.is_initialized:
            self.dtype, self.device, self.is_initialized = torch.bfloat16, key_states.device, True
            self._buffers = self._with_room(key_states, num_new), self._with_room(value_states, num_new)
        elif start + num_new > self._buffers[0].shape[-2]:
            self._buffers = tuple(self._grown(buffer, start + num_new) for buffer in self._buffers)
        for buffer, states in zip(self._buffers, (key_states, value_states), strict=True):
            buffer[..., start : start + num_new, :] = states
        self.keys, self.values = (buffer[..., : start + num_new, :] for buffer in self._buffers)
        return self.keys, self.values

    @staticmethod
    def _with_room(like: Tensor, num_tokens: int) -> Tensor:
        tokens = -(-num_tokens // BLOCK) * BLOCK
        return like.new_empty(*like.shape[:-2], tokens, like.shape[-1], dtype=torch.bfloat16)

    def _grown(self, buffer: Tensor, num_tokens: int) -> Tensor:
        grown = self._with_room(buffer, num_tokens)
        grown[..., : buffer.shape[-2], :] = buffer
        return grown


def bf16_cache() -> Cache:
    """Return an empty cache; it grows to 2 bytes x 2 x kv_heads x d x layers for each token of each row."""
    return Cache(layer_class_to_replicate=_BlockLayer)


def cache_in(values: Mapping[str, Any]) -> Cache:
    """Return the cache of a model's outputs or arguments, which transformers before 5.24 call `past_key_values`."""
    return values["cache"] if "cache" in values else values["past_key_values"]
