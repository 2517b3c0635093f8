"""Training in one process with the numerics and the checkpoints of FSDP2, which has nothing to shard there."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.model.logprobs import NumericsConfig, SequenceLogps
from src.training.engine import ModelLoader, TrainingEngine
from src.training.rounded_weights import RoundedWeights
from src.training.training_state import ShardedState, StagedState, load_sharded


class OneProcessEngine(TrainingEngine):
    """engine.strategy = fsdp in one process.

    The parameters are float32. With precision=bf16 copies of them, rounded once a step, compute in their place.
    """

    _rounded: RoundedWeights | None = None

    @property
    def checkpoint_format(self) -> str:
        return "sharded"

    def prepare(self, load: ModelLoader, numerics: NumericsConfig) -> Any:
        self.policy = SequenceLogps(self.configure_model(load()), numerics).train().to(self.device)
        self.optimizer = self._optimizer_of(self.policy)
        if numerics.precision == "bf16":
            self._rounded = RoundedWeights(self.policy, sum_in_linear=not self.resources.compile)
        return self.policy

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._rounded is None else self._rounded.in_place()

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.trainer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self._weights_changed()
        return norm

    def _weights_changed(self) -> None:
        if self._rounded is not None:
            self._rounded.outdated = True

    @property
    def saves_in_background(self) -> bool:
        return True

    def stage_state(self, folder: Path) -> StagedState:
        return ShardedState(self.policy, self.optimizer, folder)

    def load_state(self, folder: Path) -> None:
        load_sharded(self.policy, self.optimizer, folder)
        self._weights_changed()

    def gather_model(self) -> Any:
        self.policy = self.optimizer = self._rounded = None
        return self._published(self._model)

    def close(self) -> None:
        super().close()
        self._rounded = None
