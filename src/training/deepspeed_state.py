"""DeepSpeed's configuration, the float32 weights that it trains, and its checkpoints.

Only the same strategy on as many ranks loads a checkpoint.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from torch import Tensor

from src.config.schema import Training
from src.distributed import get_distributed
from src.planning.resources import Resources
from src.store.files import file_digest, fsync_file
from src.training.training_state import WrittenPart


def deepspeed_config(resources: Resources, trainer: Training, precision: str, device: torch.device) -> dict[str, Any]:
    """Return DeepSpeed's configuration, with every value that the trainer also has taken from the trainer."""
    cuda = device.type == "cuda"
    zero: dict[str, Any] = {"stage": resources.zero_stage, "contiguous_gradients": True, "overlap_comm": cuda}
    if resources.strategy.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    config = {
        # Both are nominal: the training loop packs micro-batches by tokens and decides where a step ends.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": trainer.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }
    if precision == "bf16":
        # The master weights and the moments of Adam are float32, as the sums of gradients over micro-batches and ranks.
        config["bf16"] = {"enabled": True}
        config["data_types"] = {"grad_accum_dtype": "fp32"}
        config["communication_data_type"] = "fp32"
    return config


def set_master_weights(policy: torch.nn.Module, weights: dict[str, Tensor], device: torch.device) -> None:
    """Set the float32 weights that DeepSpeed trains, which it has made of bf16 ones, to those of rank 0.

    weights: float32, by name in the policy; other ranks pass none. Every rank calls this, and holds one whole weight at
    a time. Frozen weights stay rounded.
    """
    from deepspeed.utils import safe_set_full_fp32_param, safe_set_local_fp32_param

    ranks = get_distributed()
    for name, parameter in policy.named_parameters():
        if not parameter.requires_grad:
            continue
        shape = getattr(parameter, "ds_shape", parameter.shape)  # ZeRO-3's parameters are empty between their uses
        value = weights[name].to(device) if ranks.is_main_process else torch.empty(shape, device=device)
        if ranks.size > 1:
            dist.broadcast(value, 0)
        if hasattr(parameter, "ds_tensor"):
            length = parameter.ds_tensor.numel()
            padding = length * ranks.size - value.numel()
            padded = torch.nn.functional.pad(value.flatten(), (0, padding))
            safe_set_local_fp32_param(parameter, padded[length * ranks.rank : length * (ranks.rank + 1)])
        else:
            safe_set_full_fp32_param(parameter, value)


def gather_master_weights(policy: torch.nn.Module) -> dict[str, Tensor]:
    """Return the whole float32 weights that DeepSpeed has trained, in CPU memory, on rank 0; every rank calls this."""
    from deepspeed.utils import safe_get_full_fp32_param

    weights = {}
    for name, parameter in policy.named_parameters():
        if parameter.requires_grad:
            value = safe_get_full_fp32_param(parameter)
            if get_distributed().is_main_process:
                weights[name] = value.cpu()
    return weights


class DeepSpeedState:
    """The state of a ZeRO strategy: DeepSpeed saves it, all ranks at once and before training goes on."""

    def __init__(self, accelerator: Accelerator, folder: Path) -> None:
        self._accelerator, self._folder = accelerator, folder

    def write(self) -> WrittenPart:
        ranks = get_distributed()
        self._accelerator.save_state(str(self._folder), exclude_frozen_parameters=True)
        ranks.barrier()  # until the folder is complete: which files are this rank's is read from their names
        files = [path for path in sorted(self._folder.rglob("*")) if path.is_file() and _writer_of(path) == ranks.rank]
        for path in files:
            fsync_file(path)
        return WrittenPart({path.relative_to(self._folder).as_posix(): file_digest(path) for path in files})

    def finish(self, parts: Sequence[WrittenPart]) -> dict[str, str]:
        return {}


def _writer_of(path: Path) -> int:
    """Return the rank that has written a file of DeepSpeed or accelerate; 0 for those that are not numbered."""
    numbered = re.match(r"(?:bf16_)?zero_pp_rank_(\d+)_|random_states_(\d+)\.", path.name)
    return int(next(filter(None, numbered.groups()))) if numbered else 0
