"""Low-rank adapters (model.lora) through peft: what is trained instead of the weights, and merged into them afterwards.

The reference of LoRA training is the adapter switched off, which is the checkpoint it starts from: the same cached
log-probs as for full training. There is no dropout: with it, results would depend on how examples are packed.
"""

from __future__ import annotations

from typing import Any

import torch

from src.config import ConfigError, Lora
from src.logprobs import prepare


def add(model: Any, spec: Lora, seed: int) -> Any:
    """Put fresh adapters into `model`, in place, and freeze all else; returns peft's view of it, for `merge`.

    Raises ConfigError when the model has no layers of these names.
    """
    from peft import LoraConfig, get_peft_model

    targets = list(spec.targets) if spec.targets else "all-linear"  # of every decoder layer; never the head
    config = LoraConfig(
        r=spec.rank, lora_alpha=spec.alpha, lora_dropout=0.0, target_modules=targets, task_type="CAUSAL_LM"
    )
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        try:
            adapted = get_peft_model(model, config)
        except ValueError as error:
            raise ConfigError(f"model.lora.targets={targets}: {str(error).splitlines()[0]}") from None
    prepare(model)
    return adapted


def merge(adapted: Any) -> Any:
    """The model with its adapters added into its weights: an ordinary one again."""
    return adapted.merge_and_unload()
