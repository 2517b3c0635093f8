"""Training in one process with the numerics and the checkpoints of FSDP2, which has nothing to shard there."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from torch import Tensor

from src.model.logprobs import NumericsConfig, SequenceLogps
from src.training.engine import ModelLoader
from src.training.rounded_weights import RoundedWeights
from src.training.sharded_engine import ShardedEngine


class OneProcessEngine(ShardedEngine):
    """engine.strategy = fsdp in one process.

    The parameters are float32. With precision=bf16 copies of them, rounded once a step, compute in their place.
    """

    _rounded: RoundedWeights | None = None

    def prepare(self, load: ModelLoader, numerics: NumericsConfig) -> Any:
        self.policy = SequenceLogps(self.configure_model(load()), numerics).train().to(self.device)
        self.optimizer = self._optimizer_of(self.policy)
        if numerics.precision == "bf16":
            self._rounded = RoundedWeights(self.policy, sum_in_linear=not self.resources.compile)
        return self.policy

    def micro_step(self, last: bool) -> AbstractContextManager[None]:
        return contextlib.nullcontext() if self._rounded is None else self._rounded.in_place()

    def step(self) -> Tensor:
        norm = super().step()
        self._weights_changed()
        return norm

    def load_state(self, folder: Path) -> None:
        super().load_state(folder)
        self._weights_changed()

    def _weights_changed(self) -> None:
        if self._rounded is not None:
            self._rounded.outdated = True

    def gather_model(self) -> Any:
        self.policy = self.optimizer = self._rounded = None
        return self._published(self._model)

    def close(self) -> None:
        super().close()
        self._rounded = None
