"""Multi-process runs (DDP, FSDP2 or ZeRO).

Rank 0 holds the lease, writes and publishes; the other ranks take part in the training stages only.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from src.environment import read_integer
from src.errors import ConfigError

# Control messages between stages wait while rank 0 generates samples alone, which can take days.
CONTROL_TIMEOUT = timedelta(days=7)
# After it a collective that one rank never joins ends the run. Ranks meet in every step; the longest that some wait for
# others is while weights are read, or DeepSpeed writes its files, on a slow disk.
STEP_TIMEOUT = timedelta(minutes=30)


@dataclass(frozen=True)
class DistributedContext:
    """The ranks of this run, numbered by RANK, WORLD_SIZE and LOCAL_RANK (set by torchrun or by our SLURM jobs)."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks on this machine
    local_rank: int = 0  # the index of this rank's GPU
    gloo_group: Any = None  # process group for control messages

    @property
    def is_main_process(self) -> bool:
        return self.rank == 0

    def broadcast_object(self, message: Any = None) -> Any:
        """Return rank 0's message on every rank."""
        box = [message]
        if self.size > 1:
            dist.broadcast_object_list(box, src=0, group=self.gloo_group)
        return box[0]

    def gather_objects(self, message: Any) -> list[Any]:
        """Return the messages of all ranks, in their order, on every rank."""
        messages = [message] * self.size
        if self.size > 1:
            dist.all_gather_object(messages, message, group=self.gloo_group)
        return messages

    def barrier(self) -> None:
        """Wait until every rank has called this."""
        if self.size > 1:
            dist.barrier(group=self.gloo_group)

    def all_reduce_min(self, number: int) -> int:
        """Return the smallest of all ranks' numbers on every rank."""
        smallest = torch.tensor(number)
        if self.size > 1:
            dist.all_reduce(smallest, dist.ReduceOp.MIN, group=self.gloo_group)
        return int(smallest)

    def all_reduce_sum(self, values: torch.Tensor) -> torch.Tensor:
        """Sum a tensor over all ranks, in place."""
        if self.size > 1:
            dist.all_reduce(values)
        return values


_context: DistributedContext | None = None


def get_distributed() -> DistributedContext:
    """Return the context of this process: a single rank unless `init_distributed` was called."""
    return _context or DistributedContext()


def init_distributed(strategy: str) -> DistributedContext:
    """Join the process group that the environment names, if any.

    Raises ConfigError when several processes were started for an engine that uses one.
    """
    global _context
    size, rank = read_integer("WORLD_SIZE", 1, minimum=1), read_integer("RANK", 0)
    local_rank, local_size = read_integer("LOCAL_RANK", 0), read_integer("LOCAL_WORLD_SIZE", 1, minimum=1)
    # DeepSpeed needs a process group even for a single process.
    if _context is not None or (size == 1 and not strategy.startswith("zero")):
        return get_distributed()
    if strategy == "none":
        raise ConfigError(f"{size} processes were started, but engine.strategy=none uses one: choose engine=fsdp")
    if rank >= size:
        raise ConfigError(f"RANK={rank}: must be below WORLD_SIZE={size}; start the processes with torchrun")
    if size > 1 and (missing := [name for name in ("RANK", "MASTER_ADDR", "MASTER_PORT") if name not in os.environ]):
        raise ConfigError(f"WORLD_SIZE={size}, but {missing[0]} is not set: start the processes with torchrun")
    cuda = torch.cuda.is_available()
    if cuda:
        # Depending on the site, a process sees all GPUs of the job or only one of them.
        local_rank %= torch.cuda.device_count()
        torch.cuda.set_device(local_rank)
    os.environ["LOCAL_RANK"] = str(local_rank)  # DeepSpeed and accelerate take it as the index of the GPU
    single: dict[str, Any] = {"store": dist.HashStore(), "rank": 0, "world_size": 1} if size == 1 else {}
    dist.init_process_group("cpu:gloo,cuda:nccl" if cuda else "gloo", timeout=STEP_TIMEOUT, **single)
    _context = DistributedContext(
        dist.get_rank(),
        dist.get_world_size(),
        local_size,
        local_rank,
        dist.new_group(backend="gloo", timeout=CONTROL_TIMEOUT),
    )
    return _context


def destroy_distributed() -> None:
    """Leave the process group; ranks may exit in any order afterwards."""
    global _context
    if _context is not None:
        dist.destroy_process_group()
        _context = None
