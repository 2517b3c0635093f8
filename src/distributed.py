"""Several processes of one run (engine.parallel=ddp): the first leads - it holds leases, writes and publishes - and
the others follow it through the stages that train."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from src.config import ConfigError

if TYPE_CHECKING:
    import torch

# What leader and followers tell each other between stages may take as long as the leader samples alone.
_PATIENCE = timedelta(days=7)
# A step, during which the leader may write a checkpoint of a large model to a slow disk.
_STEP = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """The processes of this run, as RANK, WORLD_SIZE and LOCAL_RANK name them (by torchrun or our SLURM jobs)."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # of them on this machine
    control: Any = None  # process group for messages

    @property
    def leads(self) -> bool:
        return self.rank == 0

    def tell(self, message: Any = None) -> Any:
        """The leader's message, in every process."""
        if self.size == 1:
            return message
        import torch.distributed as dist

        box = [message]
        dist.broadcast_object_list(box, src=0, group=self.control)
        return box[0]

    def meet(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            import torch.distributed as dist

            dist.barrier(group=self.control)

    def least(self, number: int) -> int:
        """The smallest of all processes' numbers, in every process."""
        if self.size == 1:
            return number
        import torch.distributed as dist

        numbers: list[Any] = [None] * self.size
        dist.all_gather_object(numbers, number, group=self.control)
        return min(numbers)

    def total(self, values: torch.Tensor) -> torch.Tensor:
        """Sum over all processes, in every process."""
        if self.size > 1:
            import torch.distributed as dist

            dist.all_reduce(values)
        return values


_world: World | None = None


def world() -> World:
    """This process's place; alone unless `join` was called."""
    return _world or World()


def join(parallel: str) -> World:
    """Meet the other processes when the environment names any. Raises ConfigError when the engine knows of one only."""
    global _world
    size = int(os.environ.get("WORLD_SIZE", "1"))
    # DeepSpeed wants to meet even when it is alone.
    if _world is not None or (size == 1 and not parallel.startswith("zero")):
        return world()
    if parallel == "none":
        raise ConfigError(f"{size} processes were started, but engine.parallel=none uses one: choose engine=ddp")
    import torch
    import torch.distributed as dist

    cuda = torch.cuda.is_available()
    if cuda:
        # A site may show every process all GPUs of the job, or its own alone.
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", "0")) % torch.cuda.device_count())
    if size == 1:
        os.environ.setdefault("LOCAL_RANK", "0")
    alone: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=_STEP, **alone)
    _world = World(
        dist.get_rank(),
        dist.get_world_size(),
        int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
        dist.new_group(backend="gloo", timeout=_PATIENCE),
    )
    return _world


def leave() -> None:
    """Take leave of the others; they may end in any order afterwards."""
    global _world
    if _world is not None:
        import torch.distributed as dist

        dist.destroy_process_group()
        _world = None
