"""How one training stage uses its processes and GPUs: alone, data parallel, or DeepSpeed ZeRO; all through accelerate.

Weights, gradients and optimiser state are float32 on every engine (a learning rate of 3e-7 vanishes in bf16 weights);
engine.precision is that of the computation alone. What ZeRO is told comes from the trainer's fields, nowhere else.
"""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin
from accelerate.state import AcceleratorState, PartialState

from src import lora
from src.checks import check_packages
from src.config import ConfigError, Optimisation, Point, zero_stage
from src.distributed import join, world
from src.logprobs import prepare
from src.models import device_of

if TYPE_CHECKING:
    from torch import Tensor

# It reports every file of every checkpoint, and warns of the tied weights that safetensors stores once.
logging.getLogger("accelerate").setLevel(logging.ERROR)


class TrainingEngine:
    """Loads, trains and gives back one model; every process of the run does the same with its own."""

    def __init__(self, point: Point, optimisation: Optimisation) -> None:
        """Raises ConfigError when the package it needs is missing."""
        device = device_of(point.engine)
        self.point = point
        self.zero = zero_stage(point.engine)
        self.max_norm = optimisation.max_grad_norm
        _quiet_deepspeed(device)
        AcceleratorState._reset_state()
        PartialState._reset_state()
        plugin = None
        if self.zero:
            if device.type == "cpu" and torch.cuda.is_available():
                raise ConfigError("engine.device=cpu: ZeRO takes the GPU it sees; hide it with CUDA_VISIBLE_DEVICES=")
            check_packages([point])
            join(point.engine.parallel)
            _load_deepspeed(device)
            plugin = DeepSpeedPlugin(hf_ds_config=deepspeed_config(point, optimisation, device))
        # Precision is the log-prob path's business, so that all that goes through it agrees.
        cpu = device.type == "cpu"
        PartialState(cpu=cpu)
        # Told so once more, it would forget about DeepSpeed.
        self.accelerator = Accelerator(cpu=cpu and not self.zero, deepspeed_plugin=plugin, mixed_precision="no")
        # It has been seen to go on alone where several processes were meant.
        assert self.accelerator.num_processes == world().size, f"{self.accelerator.num_processes} processes"

    @property
    def layout(self) -> str:
        """Who can read a checkpoint of this engine: `whole`, or ZeRO's parts for one number of processes."""
        return f"zero{self.zero}x{world().size}" if self.zero else "whole"

    def take(self, model: Any) -> Any:
        """The model as the point wants it trained: with adapters, recomputed activations, compiled layers."""
        self._adapted = self._adapt(model)
        if self.point.engine.activation_checkpointing:
            model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        if self.point.engine.compile:
            for layer in model.base_model.layers:
                layer.compile(dynamic=True)
        return model

    def _adapt(self, model: Any) -> Any:
        spec = self.point.model.lora
        return None if spec.rank is None else lora.add(model, spec, self.point.seed)

    def prepare(self, policy: torch.nn.Module, optimiser: torch.optim.Optimizer) -> tuple[Any, Any]:
        self.policy, self.optimiser = self.accelerator.prepare(policy, optimiser)
        return self.policy, self.optimiser

    def backward(self, loss: Tensor) -> None:
        """Gradients of one micro-batch, inside its micro_step."""
        # Gradients are summed over processes and come out as their mean.
        self.accelerator.backward(loss * world().size if world().size > 1 else loss)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """What a micro-batch is computed in: the last of a step exchanges gradients (and under ZeRO, uses them)."""
        self.accelerator.sync_gradients = last
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
            yield

    def step(self) -> Tensor:
        """Clip and apply the gradients; their norm before clipping."""
        if self.zero:  # done in the last backward
            norm = self.accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm()
        else:
            norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.max_norm)
            self.optimiser.step()
            self.optimiser.zero_grad(set_to_none=True)
        return torch.as_tensor(norm)

    def save(self, folder: Path) -> None:
        """What `load` goes on from; of the weights, those that are trained."""
        options = {"exclude_frozen_parameters": True} if self.zero else {}
        self.accelerator.save_state(str(folder), **options)

    def load(self, folder: Path) -> None:
        options = {"load_module_strict": False} if self.zero else {"strict": False}
        self.accelerator.load_state(str(folder), **options)

    def whole(self, model: Any) -> Any:
        """The trained model as an ordinary one, in the process that leads; None in the others, where ZeRO parts it."""
        if self.zero < 3:
            return lora.merge(self._adapted) if self._adapted else model
        weights = self.accelerator.get_state_dict(self.policy)
        self.close()
        if not world().leads:
            return None
        fresh = type(model)(model.config)
        self._adapted = self._adapt(fresh)
        fresh.load_state_dict({name.removeprefix("model."): value for name, value in weights.items()}, assign=True)
        fresh.tie_weights()
        return prepare((lora.merge(self._adapted) if self._adapted else fresh).to(self.accelerator.device))

    def __enter__(self) -> TrainingEngine:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()

    def close(self) -> None:
        """Let go of what DeepSpeed holds, so that the next model of this process is an ordinary one again."""
        if self.zero:
            from transformers.integrations.deepspeed import unset_hf_deepspeed_config

            if wrapped := self.accelerator.deepspeed_engine_wrapped:
                wrapped.engine.destroy()
                self.accelerator.deepspeed_engine_wrapped = None
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)


def deepspeed_config(point: Point, optimisation: Optimisation, device: torch.device) -> dict[str, Any]:
    """DeepSpeed's configuration for a point: everything it could disagree about with the trainer is the trainer's."""
    stage, cuda = zero_stage(point.engine), device.type == "cuda"
    zero: dict[str, Any] = {"stage": stage, "contiguous_gradients": True, "overlap_comm": cuda}
    if stage == 3:
        zero["stage3_gather_16bit_weights_on_model_save"] = True  # of whatever precision the weights have
    if point.engine.parallel.endswith("_offload"):
        zero["offload_optimizer"] = {"device": "cpu", "pin_memory": cuda}
        zero["offload_param"] = {"device": "cpu", "pin_memory": cuda}
    return {
        # Examples are packed to a token budget: what a micro-batch is and where a step ends is decided by training.
        "train_micro_batch_size_per_gpu": 1,
        "gradient_accumulation_steps": 1,
        "gradient_clipping": optimisation.max_grad_norm,
        "zero_allow_untested_optimizer": True,
        "zero_force_ds_cpu_optimizer": False,
        "zero_optimization": zero,
        "steps_per_print": 10**9,
    }


def _quiet_deepspeed(device: torch.device) -> None:
    """accelerate imports it wherever it is installed, and it has much to say."""
    os.environ.setdefault("DS_ACCELERATOR", device.type)
    logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
    warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")  # at every call


def _load_deepspeed(device: torch.device) -> None:
    """Import it, without the compiler it would start for a faster sum on CPUs."""
    import deepspeed

    if device.type == "cpu":
        deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
