"""Multi-process runs (DDP, FSDP2 or ZeRO).

Rank 0 holds the lease, writes and publishes; all ranks compute. In training they meet in every step. Elsewhere each
computes its `Share` of batches that are planned as for one process, and they meet when all are done (`JointWork`).
"""

from __future__ import annotations

import base64
import contextlib
import itertools
import math
import os
import pickle
import time
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist

from src.environment import read_integer
from src.errors import ConfigError, StageError, describe_failure

B = TypeVar("B", bound=Sequence[Any])

# Control messages between stages wait while rank 0 asks a judge's endpoint, or another job computes a stage that this
# one needs, which can take days.
CONTROL_TIMEOUT = timedelta(days=7)
# After it a collective that one rank never joins ends the run. Ranks meet in every step; the longest that some wait for
# others is while weights are read, or DeepSpeed writes its files, on a slow disk.
STEP_TIMEOUT = timedelta(minutes=30)
POLL_SECONDS = 0.1  # between two looks at what other ranks have done
ERROR_SECONDS = 3.0  # for which rank 0 waits after an error, at most, until the other ranks have read it
_FAILURE = "failure"  # key of the first error of any rank
_NUM_READERS = "readers"  # key of the number of ranks that have read it


@dataclass(frozen=True)
class Share:
    """The batches of one rank. They are planned as for one process, so that results do not depend on the ranks."""

    rank: int = 0
    size: int = 1
    done: Container[Any] = ()  # items of batches that are known already, the same ones on every rank

    def of(self, batches: Iterable[B]) -> list[B]:
        """Return every size-th of the batches that are not done, whole: the shape of a batch decides rounding."""
        remaining = [batch for batch in batches if not self.is_done(batch)]
        return remaining[self.rank :: self.size]

    def is_done(self, batch: Sequence[Any]) -> bool:
        return all(item in self.done for item in batch)


EVERYTHING = Share()


@dataclass(frozen=True)
class DistributedContext:
    """The ranks of this run, numbered by RANK, WORLD_SIZE and LOCAL_RANK (set by torchrun or by our SLURM jobs)."""

    rank: int = 0
    size: int = 1
    local_size: int = 1  # ranks on this machine
    local_rank: int = 0  # the index of this rank's GPU
    gloo_group: Any = None  # process group for control messages
    work_numbers: Iterator[int] = field(default_factory=itertools.count, compare=False, repr=False)

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

    def share(self, done: Container[Any]) -> Share:
        """Return the share of this rank. done: the items that are known already, the same on every rank."""
        return Share(self.rank, self.size, done)

    @property
    def store(self) -> Any:
        """Keys and values that a rank reads and writes without waiting for the others; only with several ranks."""
        # torch names no public way to the store of its process group, which torchrun or rank 0 serves.
        return dist.PrefixStore("alignment-sweep", dist.distributed_c10d._get_default_store())

    @contextlib.contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let the first exception that any rank raises in the body be the one that all of them raise.

        A rank hears of it in `JointWork`, or when it waits for a rank that has ended because of it.
        """
        try:
            yield
        except Exception as error:
            first = self._first_failure(error)
            if first is error:
                raise
            raise first from error

    def _first_failure(self, error: Exception) -> Exception:
        """Return the first error of any rank, which is `error` if none has failed before."""
        if self.size == 1:
            return error
        try:
            content = self.store.compare_set(_FAILURE, "", _pickled(self.rank, error))
            self._wait_until_all_have_read_it()
        except Exception:  # of any type: the process that serves the store, rank 0 or torchrun, has ended
            if type(error) is RuntimeError or isinstance(error, dist.DistError):  # of a collective, because of that
                return StageError("process 0 of the run has ended, and with it the run: its own message says why")
            return error
        rank, first = pickle.loads(base64.b85decode(content))
        return error if rank == self.rank else first

    def _wait_until_all_have_read_it(self) -> None:
        """Say that this rank has read the first error; on rank 0, wait until the other ranks have said so, too.

        Without torchrun the store is served by rank 0 and ends with it. The wait is short, because a rank that is in a
        collective reads the error only when the collective fails, which may be when rank 0 has ended.
        """
        num_readers, deadline = self.store.add(_NUM_READERS, 1), time.monotonic() + ERROR_SECONDS
        while self.is_main_process and num_readers < self.size and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS / 4)
            num_readers = self.store.add(_NUM_READERS, 0)

    def raise_failure(self) -> None:
        """Raise the error of a rank that has failed, if there is one."""
        if self.size > 1 and self.store.check([_FAILURE]):
            raise pickle.loads(base64.b85decode(self.store.get(_FAILURE)))[1]


def _pickled(rank: int, error: Exception) -> str:
    """Return rank and error as text; an error that cannot be pickled by its description."""
    try:
        content = pickle.dumps((rank, error))
        pickle.loads(content)
    except Exception:  # of any type: that of the error's own code
        content = pickle.dumps((rank, StageError(f"process {rank}: {describe_failure(error)}")))
    return base64.b85encode(content).decode()


class JointWork:
    """Work whose shares the ranks compute apart: each tells how much of it is done, and hears when another has failed.

    Every rank makes one, in the same order. Ranks that wait are not in a collective, so that rank 0 keeps its lease,
    reports progress, and stops when it is asked to.
    """

    def __init__(self, ranks: DistributedContext, num_done: int = 0) -> None:
        """num_done: items that were done before."""
        self._ranks, self._num_before, self._num_done = ranks, num_done, 0
        self._key = f"work-{next(ranks.work_numbers)}"
        self._untold, self._asked_at = 0, -math.inf  # items that the others have not heard of, and when they last did

    def advance(self, count: int = 0) -> int:
        """Add to the number of items that are done; return that of all ranks. Raises the error of a failed rank.

        With a count it asks the other ranks a few times a second only: items may be thousands a second.
        """
        self._untold += count
        if self._ranks.size == 1:
            self._num_done = self._untold
        elif not count or time.monotonic() - self._asked_at >= POLL_SECONDS:
            self._ranks.raise_failure()
            self._num_done = self._ranks.store.add(f"{self._key}/done", self._untold)
            self._untold, self._asked_at = 0, time.monotonic()
        return self._num_before + self._num_done

    def wait(self, report: Callable[[int], None]) -> None:
        """Return when every rank has called this; meanwhile report the items that are done. Raises like `advance`."""
        if self._ranks.size > 1:
            self.advance()
            self._ranks.store.add(f"{self._key}/finished", 1)
            pause = POLL_SECONDS / 32  # short at first: shares of little work end within moments of each other
            while self._ranks.store.add(f"{self._key}/finished", 0) < self._ranks.size:
                report(self.advance())
                time.sleep(pause)
                pause = min(2 * pause, POLL_SECONDS)
        report(self.advance())


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
