"""What the engines of engine.strategy=fsdp share, on one process and on several: torch's optimizer and checkpoints."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.training.engine import TrainingEngine
from src.training.training_state import StagedState, load_sharded


class ShardedEngine(TrainingEngine):
    """Steps with torch's AdamW on `self.policy`, whose state is saved by torch.distributed.checkpoint."""

    @property
    def checkpoint_format(self) -> str:
        return "sharded"

    def backward(self, loss: Tensor) -> None:
        loss.backward()

    def step(self) -> Tensor:
        norm = torch.nn.utils.clip_grad_norm_(self.policy.parameters(), self.trainer.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        return whole(norm)

    @property
    def saves_in_background(self) -> bool:
        return True

    def stage_state(self, folder: Path) -> StagedState:
        return self.sharded_saves.stage(self.policy, self.optimizer, folder)

    def load_state(self, folder: Path) -> None:
        load_sharded(self.policy, self.optimizer, folder)


def whole(tensor: Tensor) -> Tensor:
    """Return the whole of a tensor that ranks may hold in shards; every rank calls this."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
