"""Random models and pairs of the check, at the shape of the device: real on a card, tiny on a CPU."""

from __future__ import annotations

import random
from typing import Any

import torch
import yaml
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

from src.config.schema import CONF_DIR
from src.data.examples import Example
from src.planning.model_shape import model_shape

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


def llama_of(model: str, device: torch.device, layers: int | None = None) -> Any:
    """Return a random float32 model made on the device, of the shape that conf/model has under this name.

    layers: only so many of its decoder layers.
    """
    location = yaml.safe_load((CONF_DIR / "model" / f"{model}.yaml").read_text(encoding="utf-8"))["path"]
    shape = model_shape(location)
    assert shape is not None, f"conf/hub_configs.yaml has no {location}"
    config = dict(shape.config) | ({"num_hidden_layers": layers} if layers else {})
    config = AutoConfig.for_model(config.pop("model_type"), **config)
    torch.manual_seed(0)
    with device:
        made = AutoModelForCausalLM.from_config(config, attn_implementation="sdpa", dtype=torch.float32)
    return made.eval()


def pairs(count: int, vocabulary: int, longest: int, seed: int = 0) -> list[Example]:
    """Return random preference pairs with prompts and responses of up to `longest` tokens each, some of one token."""
    rng = random.Random(seed)

    def tokens() -> tuple[int, ...]:
        return tuple(rng.randrange(3, vocabulary) for _ in range(rng.choice([1, *[rng.randint(2, longest)] * 7])))

    return [Example(tokens(), (tokens(), tokens())) for _ in range(count)]
