"""Training on one process, with DDP, or with DeepSpeed ZeRO, all through accelerate."""

from __future__ import annotations

import contextlib
import logging
import os
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from accelerate import Accelerator, DeepSpeedPlugin, DistributedDataParallelKwargs
from accelerate.state import AcceleratorState, PartialState
from torch import Tensor
from transformers.integrations.deepspeed import set_hf_deepspeed_config, unset_hf_deepspeed_config

from src.config.packages import require_package
from src.config.schema import Lora, Training
from src.distributed import get_distributed, init_distributed
from src.errors import ConfigError
from src.model.logprobs import NumericsConfig, SequenceLogps
from src.planning.resources import Resources
from src.training.deepspeed_state import DeepSpeedState, deepspeed_config, gather_master_weights, set_master_weights
from src.training.engine import ModelLoader, TrainingEngine, empty_model
from src.training.training_state import StagedState, load_sharded

# accelerate logs every file of every checkpoint, and warns about tied weights, which safetensors stores once.
logging.getLogger("accelerate").setLevel(logging.ERROR)


class AccelerateEngine(TrainingEngine):
    """engine.strategy = none, ddp, zero1, zero2, zero3 or zero3_offload."""

    def __init__(self, resources: Resources, trainer: Training, lora: Lora | None, seed: int) -> None:
        """Join the ranks of ZeRO. Raises ConfigError also when DeepSpeed is missing."""
        super().__init__(resources, trainer, lora, seed)
        self.accelerator: Any = None
        self.zero = resources.zero_stage
        if self.zero:
            if self.device.type == "cpu" and torch.cuda.is_available():
                raise ConfigError("engine.device=cpu: ZeRO uses any GPU it finds; hide GPUs with CUDA_VISIBLE_DEVICES=")
            require_package("deepspeed", f"engine.strategy={resources.strategy}")
            init_distributed(resources.strategy)

    def _make_accelerator(self, precision: str) -> Any:
        # Silence DeepSpeed, which accelerate imports wherever it is installed. torch's logger warns at every call.
        os.environ.setdefault("DS_ACCELERATOR", self.device.type)
        logging.getLogger("DeepSpeed").setLevel(logging.ERROR)
        warnings.filterwarnings("ignore", category=FutureWarning, module="torch.distributed.c10d_logger")
        AcceleratorState._reset_state(reset_partial_state=True)
        plugin = None
        if self.zero:
            import deepspeed

            if self.device.type == "cpu":  # do not compile its shared-memory all-reduce
                deepspeed.ops.__compatible_ops__["deepspeed_shm_comm"] = False
            config = deepspeed_config(self.resources, self.trainer, precision, self.device)
            plugin = DeepSpeedPlugin(hf_ds_config=config)
        cpu = self.device.type == "cpu"
        # accelerate takes this variable for a sign of several processes. It is also set for ZeRO in a single one, and
        # would make DDP of the next engine of that process.
        os.environ.pop("LOCAL_RANK", None)
        if self.resources.strategy != "none":
            os.environ["LOCAL_RANK"] = str(get_distributed().local_rank)
        PartialState(cpu=cpu)
        accelerator = Accelerator(
            # Passing cpu=True again would disable the DeepSpeed plugin.
            cpu=cpu and not self.zero,
            deepspeed_plugin=plugin,
            # Applied in the log-prob path, so that everything that uses that path agrees.
            mixed_precision="no",
            # The gradients are views of what DDP sends: otherwise there are two copies of them. Buffers, which are the
            # same on all ranks, are not sent again in forward passes.
            kwargs_handlers=[DistributedDataParallelKwargs(gradient_as_bucket_view=True, broadcast_buffers=False)],
        )
        # accelerate has been observed to fall back to a single process silently.
        assert accelerator.num_processes == get_distributed().size, f"{accelerator.num_processes} processes"
        return accelerator

    @property
    def checkpoint_format(self) -> str:
        """The format of this engine's checkpoints: `sharded` (torch's) or `zeroSxN` (ZeRO-S on N ranks)."""
        return f"zero{self.zero}x{get_distributed().size}" if self.zero else "sharded"

    def prepare(self, load: ModelLoader, numerics: NumericsConfig) -> Any:
        self.accelerator = self._make_accelerator(numerics.precision)
        self._load = load
        policy = SequenceLogps(self.configure_model(load()), numerics).train()
        # DeepSpeed makes its float32 master weights of the weights that it has rounded to bf16.
        is_rounded = self.zero and numerics.precision == "bf16" and self.lora is None
        weights = self._float32_weights(policy) if is_rounded and get_distributed().is_main_process else {}
        policy.to(self.device)
        buffers = {name: buffer.clone() for name, buffer in policy.named_buffers()}
        self.policy, self.optimizer = self.accelerator.prepare(policy, self._optimizer_of(policy))
        for name, buffer in policy.named_buffers():
            buffer.data = buffers[name]  # some releases of DeepSpeed round them, frequencies of positions, to bf16
        if is_rounded:
            set_master_weights(policy, weights, self.device)
        return self.policy

    def _float32_weights(self, policy: SequenceLogps) -> dict[str, Tensor]:
        """Return the weights that training starts from, in CPU memory, by name in the policy."""
        if self.zero < 3:
            return {name: parameter.detach() for name, parameter in policy.named_parameters()}
        # Of the policy, ZeRO-3 has rounded and divided every weight as soon as it was there.
        unset_hf_deepspeed_config()
        model = self._load()
        set_hf_deepspeed_config(self.accelerator.state.deepspeed_plugin.dschf)
        return {f"model.{name}": parameter.detach() for name, parameter in model.named_parameters()}

    def backward(self, loss: Tensor) -> None:
        # DDP and ZeRO average gradients over ranks.
        self.accelerator.backward(loss * get_distributed().size)

    @contextlib.contextmanager
    def micro_step(self, last: bool) -> Iterator[None]:
        """Under ZeRO the gradients are also applied in the last backward pass of a step."""
        self.accelerator.sync_gradients = last
        with contextlib.nullcontext() if last else self.accelerator.no_sync(self.policy):
            yield

    def step(self) -> Tensor:
        if self.zero:  # DeepSpeed has applied them in the last backward pass
            norm = self.accelerator.deepspeed_engine_wrapped.engine.get_global_grad_norm()
        else:
            norm = self.accelerator.clip_grad_norm_(self.policy.parameters(), self.trainer.max_grad_norm)
            self.optimizer.step()
            self.optimizer.zero_grad(set_to_none=True)
        return torch.as_tensor(norm)

    @property
    def saves_in_background(self) -> bool:
        return not self.zero

    def stage_state(self, folder: Path) -> StagedState:
        if self.zero:
            return DeepSpeedState(self.accelerator, folder)
        return self.sharded_saves.stage(self.policy, self.optimizer.optimizer, folder)

    def load_state(self, folder: Path) -> None:
        if self.zero:
            self.accelerator.load_state(str(folder), load_module_strict=False)
        else:
            load_sharded(self.policy, self.optimizer.optimizer, folder)

    def gather_model(self) -> Any:
        if not self.zero:
            return self._published(self._model)
        weights = gather_master_weights(self.accelerator.unwrap_model(self.policy))
        model = type(self._model), self._model.config
        self.close()
        if not get_distributed().is_main_process:
            return None
        # Adapters belong to the weights that training started from.
        base = empty_model(*model) if self.lora is None else self._load()
        return self._published(self._rebuild(base, weights))

    def close(self) -> None:
        """Destroy also the DeepSpeed engine and its global state."""
        if self.zero and self.accelerator:
            if wrapped := self.accelerator.deepspeed_engine_wrapped:
                wrapped.engine.destroy()
            unset_hf_deepspeed_config()
            os.environ.pop("ACCELERATE_USE_DEEPSPEED", None)
        self.accelerator = None
        super().close()
