"""DeepSpeed's configuration, derived from the trainer's fields alone."""

from __future__ import annotations

from typing import Any

import torch

from src.config.schema import Training
from src.planning.resources import Resources


def deepspeed_config(resources: Resources, trainer: Training, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with every value that the trainer also has taken from the trainer."""
    cuda = device.type == "cuda"
    zero: dict[str, Any] = {"stage": resources.zero_stage, "contiguous_gradients": True, "overlap_comm": cuda}
    if resources.zero_stage == 3:
        # "16bit" in name only: the weights keep their precision.
        zero["stage3_gather_16bit_weights_on_model_save"] = True
    if resources.strategy.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        # Both are nominal: the training loop packs micro-batches by tokens and decides where a step ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
