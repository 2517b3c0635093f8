"""How many prompts can be sampled together in the memory of a GPU."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch

from src.hardware import release_accelerator
from src.model.kv_cache import BLOCK
from src.planning.fit import TARGET_FRACTION

T = TypeVar("T")

_BYTES_PER_LOGIT = 32  # float32 logits and their copies by the warpers, and float64 probabilities and their sums


def parts_that_fit(batch: Sequence[T], model: Any, prompt_length: int, max_new_tokens: int) -> list[Sequence[T]]:
    """Split a batch of prompts into as few equal parts as fit into the free memory of the model's GPU.

    Every response may have max_new_tokens, so that nothing that has begun runs out of memory. On a CPU the batch is the
    only part. A prompt that does not fit by itself is tried all the same.
    """
    weight = next(model.parameters())
    if weight.device.type != "cuda":
        return [batch]
    release_accelerator()
    free, total = torch.cuda.mem_get_info(weight.device)
    bytes_of_row = bytes_per_row(model.config, weight.element_size(), prompt_length, max_new_tokens)
    rows = max(1, int(free - (1 - TARGET_FRACTION) * total) // bytes_of_row)
    return split_evenly(batch, math.ceil(len(batch) / rows))


def split_evenly(items: Sequence[T], num_parts: int) -> list[Sequence[T]]:
    """Split into consecutive parts whose sizes differ by one at most."""
    edges = [len(items) * part // num_parts for part in range(num_parts + 1)]
    return [items[start:end] for start, end in pairwise(edges)]


def bytes_per_row(config: Any, element_size: int, prompt_length: int, max_new_tokens: int) -> int:
    """Return the bytes that sampling one response takes at its peak, besides the weights.

    config: of transformers. element_size: of a weight, in bytes; keys and values have the same. The peak is at the last
    token, where the keys and values of one layer exist twice while they get a block of room; or in the pass over the
    prompt, with the activations of one layer.
    """
    heads, width = config.num_attention_heads, config.hidden_size
    head_dim = getattr(config, "head_dim", None) or width // heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    inner = getattr(config, "intermediate_size", None) or 4 * width
    layer = 2 * kv_heads * head_dim * element_size
    # The residual stream, its sum and its norm are float32; keys and values are repeated for every head.
    activations = 3 * 4 * width + (3 * inner + 3 * heads * head_dim) * element_size
    cache = config.num_hidden_layers * layer
    last_token = (prompt_length + max_new_tokens + BLOCK) * (cache + layer)
    return max(last_token, prompt_length * (cache + activations)) + _BYTES_PER_LOGIT * config.vocab_size
