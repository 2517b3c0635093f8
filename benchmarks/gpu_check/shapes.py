"""Random models and pairs of the check, at the shape of the device: real on a card, tiny on a CPU."""

from __future__ import annotations

import random
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from src.data.examples import Example

# Llama shapes: (hidden, MLP, layers, heads, key-value heads, vocabulary).
SHAPES = {"tiny": (64, 128, 2, 4, 2, 320), "small": (512, 1408, 4, 8, 4, 32_000)}


def llama(shape: str, device: torch.device, seed: int = 0, **changes: Any) -> LlamaForCausalLM:
    """Return a random float32 Llama of a shape of SHAPES, far enough from uniform that attending wrongly shows."""
    hidden, mlp, layers, heads, kv_heads, vocabulary = SHAPES[shape]
    config = LlamaConfig(
        **{
            "hidden_size": hidden,
            "intermediate_size": mlp,
            "num_hidden_layers": layers,
            "num_attention_heads": heads,
            "num_key_value_heads": kv_heads,
            "vocab_size": vocabulary,
            "max_position_embeddings": 8192,
            "initializer_range": 1.2 * hidden**-0.5,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
        }
        | changes
    )
    torch.manual_seed(seed)
    model = LlamaForCausalLM(config).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # all ones before training
                parameter.uniform_(0.5, 1.5)
    return model.to(device)


def pairs(count: int, vocabulary: int, longest: int, seed: int = 0) -> list[Example]:
    """Return random preference pairs with prompts and responses of up to `longest` tokens each, some of one token."""
    rng = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(rng.choice([1, *[rng.randint(2, longest)] * 7])))

    return [Example(tokens(), (tokens(), tokens())) for _ in range(count)]
