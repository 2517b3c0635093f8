"""Low-rank adapters (model.lora) through peft, trained instead of the weights and merged into them afterwards.

The reference of LoRA training is the adapter switched off, which is the checkpoint it starts from: the same cached
log-probs as for full training. There is no dropout: with it, results would depend on how examples are packed.
"""

from __future__ import annotations

from typing import Any

import torch

from src.config.schema import Lora
from src.errors import ConfigError
from src.model.logprobs import patch_model_


def add_adapters(model: Any, lora: Lora, seed: int) -> Any:
    """Add new adapters to `model`, in place, and freeze all else; return peft's wrapper, for `merge_adapters`.

    Raises ConfigError when the model has no layers of these names.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(lora.targets) if lora.targets else "all-linear"  # of every decoder layer; never the head
    config = LoraConfig(
        r=lora.rank, lora_alpha=lora.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"model.lora.targets={targets}: {str(error).splitlines()[0]}") from None
    patch_model_(model)
    return adapted


def merge_adapters(adapted: Any) -> Any:
    """Return the model with its adapters added to its weights."""
    return adapted.merge_and_unload()
