"""What every training strategy can do: build the model, wrap it, accumulate gradients, step, return the trained one.

Weights, sums of gradients and optimizer state are float32 with every strategy, because an update by a learning rate of
3e-7 is below the resolution of bf16 weights. With engine.precision=bf16 the computation uses a rounded copy of the
weights, which the engine, FSDP2 or DeepSpeed makes.

With model.lora, low-rank adapters (peft) are trained instead of the weights, and published by themselves or merged into
them. Their reference is the adapters switched off, which is the checkpoint they start from: the same cached log-probs
as for full training. There is no dropout: with it, results would depend on how examples are packed.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from contextlib import AbstractContextManager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from accelerate import init_empty_weights
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers.modeling_layers import GradientCheckpointingLayer

from src.config.schema import Lora, Training
from src.errors import ConfigError
from src.model.adapters import Adapter, adapter_of
from src.model.loading import device_of
from src.model.logprobs import patch_model_
from src.model.numerics import NumericsConfig, round_
from src.planning.resources import Resources
from src.training.training_state import ShardedSaves, StagedState

# Returns the float32 model that training starts from, in CPU memory and not patched. An engine calls it on the ranks
# that need the weights.
ModelLoader = Callable[[], Any]

# There is no dropout, so that recomputing needs no state of random numbers.
_recompute = partial(checkpoint, use_reentrant=False, preserve_rng_state=False)


class TrainingEngine(ABC):
    """Builds and wraps one model for training and returns the trained one; every rank of the run has one."""

    policy: Any  # `src.model.logprobs.SequenceLogps` of the model, wrapped
    optimizer: Any
    _model: Any  # inside of the policy
    _adapted: Any  # peft's wrapper of it, with model.lora
    save_dtype = torch.float32  # of what is published
    adapter: Adapter | None = None  # once the model is gathered, where adapters are published

    def __init__(self, resources: Resources, trainer: Training, lora: Lora | None, seed: int) -> None:
        """`seed` is for the initial adapters. Raises ConfigError for a device that is not there."""
        self.resources, self.trainer, self.lora, self.seed = resources, trainer, lora, seed
        self.device = device_of(resources.device)
        self.sharded_saves = ShardedSaves()

    @property
    @abstractmethod
    def checkpoint_format(self) -> str:
        """The format of this engine's checkpoints, a folder name: engines with the same can resume each other's."""

    @abstractmethod
    def prepare(self, load: ModelLoader, numerics: NumericsConfig) -> Any:
        """Load the model, configure and wrap it and return the policy, in training mode. Called once, on every rank."""

    @abstractmethod
    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        """Compute a micro-batch in this context; `last` of the step, when gradients have been exchanged at its end."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Add the gradients of one micro-batch, inside its micro_step.

        The losses of all ranks and micro-batches of a step are parts of one sum.
        """

    @abstractmethod
    def step(self) -> Tensor:
        """Clip and apply the gradients, and forget them; return their norm before clipping, equal on all ranks."""

    @property
    @abstractmethod
    def saves_in_background(self) -> bool:
        """Whether a staged state is written without the other ranks, while training goes on."""

    @abstractmethod
    def stage_state(self, folder: Path) -> StagedState:
        """Return what `load_state` resumes from, to be written into the folder; of the weights, the trained ones."""

    @abstractmethod
    def load_state(self, folder: Path) -> None:
        """Load what a staged state has written."""

    @abstractmethod
    def gather_model(self) -> Any:
        """Return the trained model as it is published: rounded to save_dtype, adapters merged, patched, on the device.

        It is float32, whatever it was rounded to. Where the weights are in shards, only rank 0 gets it, and others
        None. Ends the training.
        """

    def close(self) -> None:
        """Free what training holds, and what would affect the next model of this process."""
        self.policy = self.optimizer = self._model = self._adapted = None

    def set_lr(self, lr: float) -> float:
        for group in self.optimizer.param_groups:
            group["lr"] = lr
        return lr

    def checkpoint_activations(self, enabled: bool) -> None:
        """Recompute activations in the backward passes of the following micro-batches, or stop doing so.

        All ranks must decide alike: where weights are in shards, a forward pass gathers them from all ranks.
        """
        for layer in decoder_layers(self._model):
            layer.gradient_checkpointing = enabled
            layer._gradient_checkpointing_func = _recompute

    def configure_model(self, model: Any) -> Any:
        """Patch the model and add adapters, activation checkpointing and compilation as configured, in place."""
        self._model = patch_model_(model, self.device)
        self._add_adapters(model)
        if self.resources.activation_checkpointing is True:
            self.checkpoint_activations(True)
        if self.resources.compile:
            for layer in decoder_layers(model):
                layer.compile(dynamic=True)
        return model

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
        with torch.random.fork_rng(devices=()):  # new adapters are drawn on the CPU
            torch.default_generator.manual_seed(self.seed)
            try:
                self._adapted = get_peft_model(model, config)
            except ValueError as error:
                raise ConfigError(f"model.lora.targets={targets}: {str(error).splitlines()[0]}") from None
        patch_model_(model, self.device)

    def _optimizer_of(self, policy: torch.nn.Module) -> torch.optim.Optimizer:
        trained, trainer = [p for p in policy.parameters() if p.requires_grad], self.trainer
        return torch.optim.AdamW(trained, trainer.lr, trainer.adam_betas, weight_decay=trainer.weight_decay, fused=True)

    def _rebuild(self, model: Any, weights: dict[str, Tensor]) -> Any:
        """Add adapters to a model, as configured, set these weights, by their names in the policy, and return it."""
        self._add_adapters(model)
        missing, unexpected = model.load_state_dict(
            {name.removeprefix("model."): weight for name, weight in weights.items()}, strict=False, assign=True
        )
        model.tie_weights()
        assert not unexpected and not any(p.is_meta for p in model.parameters()), (missing, unexpected)
        return model

    def _published(self, model: Any) -> Any:
        """Return a trained model as gather_model does, with what is published rounded: its adapters or its weights."""
        if self.lora is None:
            round_(model.parameters(), self.save_dtype)
        elif self.lora.publish == "adapter":
            self._adapted.to("cpu")  # where those who load them merge them, with the same sums
            round_((p for p in self._adapted.parameters() if p.requires_grad), self.save_dtype)
            self.adapter = adapter_of(self._adapted)
            model = self._adapted.merge_and_unload()
        else:
            model = self._adapted.merge_and_unload()
            round_(model.parameters(), self.save_dtype)
        return patch_model_(model.to(self.device), self.device)


def decoder_layers(model: torch.nn.Module) -> list[Any]:
    """Return the decoder layers of a transformers model, first to last."""
    return [module for module in model.modules() if isinstance(module, GradientCheckpointingLayer)]


def empty_model(model_class: Any, config: Any) -> Any:
    """Return a model whose parameters are on the meta device: without memory, and without random numbers.

    Its buffers are computed: rotary frequencies, for example, are in no checkpoint.
    """
    with init_empty_weights():
        model = model_class(config)
    model.tie_weights()  # in that context every name gets a parameter of its own
    return model
