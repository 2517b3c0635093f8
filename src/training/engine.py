"""Training on one process, with DDP, or with DeepSpeed ZeRO, all through accelerate.

Weights, gradients and optimizer state are float32 with every strategy, because an update by a learning rate of 3e-7 is
below the resolution of bf16 weights; engine.precision is that of the computation. DeepSpeed's configuration is derived
from the trainer's fields alone.

With model.lora, low-rank adapters (peft) are trained instead of the weights and merged into them afterwards. Their
reference is the adapters switched off, which is the checkpoint they start from: the same cached log-probs as for full
training. There is no dropout: with it, results would depend on how examples are packed.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from transformers.integrations.deepspeed import unset_hf_deepspeed_config

from src.config.packages import require_package
from src.config.schema import Lora, Training
from src.distributed import get_distributed, init_distributed
from src.errors import ConfigError
from src.model.loading import device_of
from src.model.logprobs import patch_model_
from src.planning.resources import Resources
from src.training.training_state import DeepSpeedState, ShardedState, StagedState, load_sharded

# accelerate logs every file of every checkpoint, and warns about tied weights, which safetensors stores once.
logging.getLogger("accelerate").setLevel(logging.ERROR)


class TrainingEngine:
    """Wraps one model for training and returns the trained one; every rank of the run has one."""

    def __init__(self, resources: Resources, trainer: Training, lora: Lora | None, seed: int) -> None:
        """Set up accelerate; `seed` is for the initial adapters. Raises ConfigError when DeepSpeed is missing."""
        self.resources, self.trainer, self.lora, self.seed = resources, trainer, lora, seed
        self.device = device_of(resources.device)
        self.zero = resources.zero_stage
        # Silence DeepSpeed, which accelerate imports wherever it is installed. torch's logger warns at every call.
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = None
        if self.zero:
            if self.device.type == "cpu" and torch.cuda.is_available():
                raise ConfigError("engine.device=cpu: ZeRO uses any GPU it finds; hide GPUs with CUDA_VISIBLE_DEVICES=")
            require_package("deepspeed", f"engine.strategy={resources.strategy}")
            init_distributed(resources.strategy)
            import deepspeed

            if self.device.type == "cpu":  # do not compile its shared-memory all-reduce
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(resources, trainer, self.device))
        # Precision is applied in the log-prob path, so that everything that uses that path agrees.
        cpu = self.device.type == "cpu"
        PartialState(cpu=cpu)
        # Passing cpu=True again would disable the DeepSpeed plugin.
        self.accelerator = Accelerator(cpu=cpu and not self.zero, deepspeed_plugin=plugin, mixed_precision="no")
        # accelerate has been observed to fall back to a single process silently.
        assert self.accelerator.num_processes == get_distributed().size, f"{self.accelerator.num_processes} processes"

    @property
    def checkpoint_format(self) -> str:
        """The format of this engine's checkpoints: `sharded` (torch's) or `zeroSxN` (ZeRO-S on N ranks)."""
        return f"zero{self.zero}x{get_distributed().size}" if self.zero else "sharded"

    def configure_model(self, model: Any) -> Any:
        """Add adapters, activation checkpointing and compilation to the model as configured, in place."""
        self._model = model
        self._add_adapters(model)
        if self.resources.activation_checkpointing is True:
            self.checkpoint_activations(True)
        if self.resources.compile:
            for layer in model.base_model.layers:
                layer.compile(dynamic=True)
        return model

    def checkpoint_activations(self, enabled: bool) -> None:
        """Recompute activations in the backward passes of the following micro-batches, or stop doing so.

        All ranks must decide alike: where weights are in shards, a forward pass gathers them from all ranks.
        """
        if enabled:
            self._model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        else:
            self._model.gradient_checkpointing_disable()

    def _add_adapters(self, model: Any) -> None:
        """Add new adapters to `model`, in place, and freeze all else; nothing without model.lora.

        Raises ConfigError when the model has no layers of these names.
        """
        if self.lora is None:
            return
        from peft import LoraConfig, get_peft_model

        targets = list(self.lora.targets or ()) or "all-linear"  # of every decoder layer; never the head
        rank, alpha = self.lora.rank, self.lora.alpha
        config = LoraConfig(r=rank, lora_alpha=alpha, target_modules=targets, task_type="CAUSAL_LM")
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            try:
                self._adapted = get_peft_model(model, config)
            except ValueError as error:
                raise ConfigError(f"model.lora.targets={targets}: {str(error).splitlines()[0]}") from None
        patch_model_(model)

    def prepare(self, policy: torch.nn.Module) -> Any:
        """Return the policy wrapped for the strategy; the engine keeps it and its optimizer."""
        trained, trainer = [p for p in policy.parameters() if p.requires_grad], self.trainer
        optimizer = torch.optim.AdamW(
            trained, trainer.lr, trainer.adam_betas, weight_decay=trainer.weight_decay, fused=True
        )
        self.policy, self.optimizer = self.accelerator.prepare(policy, optimizer)
        return self.policy

    def set_lr(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def backward(self, loss: Tensor) -> None:
        """Accumulate the gradients of one micro-batch, inside its micro_step."""
        # DDP and ZeRO average gradients over ranks, while the ranks' losses are parts of one sum.
        self.accelerator.backward(loss * get_distributed().size)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Compute a micro-batch; gradients are exchanged (and under ZeRO applied) in the last one of a step."""
        self.accelerator.sync_gradients = last
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
            yield

    def step(self) -> Tensor:
        """Clip and apply the gradients; return their norm before clipping."""
        if self.zero:  # DeepSpeed has applied them in the last backward pass
            norm = self.accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm()
        else:
            norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.trainer.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return torch.as_tensor(norm)

    @property
    def saves_in_background(self) -> bool:
        """Whether a staged state is written without the other ranks, while training goes on."""
        return not self.zero

    def stage_state(self, folder: Path) -> StagedState:
        """Return what `load_state` resumes from, to be written into the folder; of the weights, the trainable ones."""
        if self.zero:
            return DeepSpeedState(self.accelerator, folder)
        return ShardedState(self.policy, self.optimizer.optimizer, folder)

    def load_state(self, folder: Path) -> None:
        if self.zero:
            self.accelerator.load_state(str(folder), load_module_strict=False)
        else:
            load_sharded(self.policy, self.optimizer.optimizer, folder)

    def gather_model(self, model: Any) -> Any:
        """Return the trained model unwrapped, with adapters merged. Under ZeRO-3 ranks other than 0 get None."""
        if self.zero == 3:
            weights = self.accelerator.get_state_dict(self.policy)
            self.close()
            if not get_distributed().is_main_process:
                return None
            model = type(model)(model.config)
            self._add_adapters(model)
            model.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()}, assign=True)
            model.tie_weights()
        merged = model if self.lora is None else self._adapted.merge_and_unload()
        return patch_model_(merged.to(self.accelerator.device))

    def close(self) -> None:
        """Destroy the DeepSpeed engine and its global state, which would affect the next model of this process."""
        if self.zero:
            if wrapped := self.accelerator.deepspeed_engine_wrapped:
                wrapped.engine.destroy()
                self.accelerator.deepspeed_engine_wrapped = None
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


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
