"""Models without values, in the memory of the host as if they had just been loaded."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import torch
from transformers import AutoConfig, AutoModelForCausalLM

from src.errors import ConfigError
from src.model.attention import check_supported
from src.rehearsal.device import FakeCudaMode

END_ID = 2


def config_of(values: dict[str, Any], layers: int | None = None) -> Any:
    """Return a transformers config of these values of config.json, with another number of layers where given.

    Raises ConfigError for an architecture that the log-prob path does not support.
    """
    fields = {
        name: value for name, value in values.items() if name not in ("torch_dtype", "dtype", "quantization_config")
    }
    try:
        config = AutoConfig.for_model(**fields)
    except (KeyError, ValueError, TypeError) as error:
        raise ConfigError(f"config.json: {' '.join(str(error).split())}") from error
    if layers is not None:
        config.num_hidden_layers = layers
        if getattr(config, "layer_types", None):
            config.layer_types = config.layer_types[:layers]
    check_supported(config, 1)
    return config


def num_parameters(config: Any) -> int:
    """Return the number of parameters of a model of this config."""
    with torch.device("meta"):
        return sum(p.numel() for p in AutoModelForCausalLM.from_config(config).parameters())


def load_fake(config: Any, mode: FakeCudaMode) -> Any:
    """Return a float32 model whose weights are fake tensors on the host; its buffers are real."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, attn_implementation="sdpa")
    real = AutoModelForCausalLM.from_config(_small(config), dtype=torch.float32)
    for name, buffer in real.named_buffers():
        owner, _, leaf = name.rpartition(".")
        model.get_submodule(owner)._buffers[leaf] = buffer
    fakes: dict[int, torch.nn.Parameter] = {}
    for module in model.modules():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                if id(parameter) not in fakes:
                    fakes[id(parameter)] = torch.nn.Parameter(mode.fake_on_host(parameter), parameter.requires_grad)
                module._parameters[name] = fakes[id(parameter)]
    model.tie_weights()
    return model


def _small(config: Any) -> Any:
    """Return a config whose model has the same buffers, rotary frequencies, and hardly any weights."""
    small = type(config).from_dict(config.to_dict())
    small.num_hidden_layers, small.vocab_size, small.intermediate_size = 1, 8, 8
    small.pad_token_id = None
    if getattr(small, "layer_types", None):
        small.layer_types = small.layer_types[:1]
    return small


def template() -> Any:
    """Return what `sample` asks of a template."""
    return SimpleNamespace(tokenizer=SimpleNamespace(bos_token_id=1), end_id=END_ID, end_ids=(END_ID,))
