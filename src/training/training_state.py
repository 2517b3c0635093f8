"""What training resumes from, weights and optimizer state, as every rank writes its own part of it.

One process, DDP and FSDP2 have one format, that of torch.distributed.checkpoint: any of them, with any number of ranks,
loads what any other has saved. DeepSpeed has its own (`deepspeed_state.py`).
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Protocol

import torch
import torch.distributed.checkpoint as dcp
from torch import Tensor
from torch.distributed.checkpoint import DefaultSavePlanner, FileSystemReader, FileSystemWriter
from torch.distributed.checkpoint.planner import SavePlan, WriteItem
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

from src.distributed import get_distributed
from src.store.files import file_digest

# strict=False: adapters are saved without the frozen weights, and a tied weight under one of its names.
_OPTIONS = StateDictOptions(ignore_frozen_params=True, strict=False)


@dataclass(frozen=True)
class WrittenPart:
    """What one rank has written and hashed."""

    digests: dict[str, str]  # of its files, by path in the folder of the checkpoint
    index: Any = field(default_factory=list)  # where in them is what, for `finish`


class StagedState(Protocol):
    """A training state between the step that it belongs to and its publication. Every rank has one."""

    def write(self) -> WrittenPart:
        """Write and flush this rank's files, and hash them."""

    def finish(self, parts: Sequence[WrittenPart]) -> dict[str, str]:
        """Complete the folder on rank 0, once all ranks have written; return the digests of the files it adds."""


class _StagingPlanner(DefaultSavePlanner):
    """Copies this rank's part of the state to CPU memory as soon as it is known, so that training can go on."""

    def finish_plan(self, new_plan: SavePlan) -> SavePlan:
        plan = super().finish_plan(new_plan)
        # Of a parameter that ranks hold in copies (DDP) exactly one has it in its plan: the one with least to write.
        self._staged = {item.index: self._copy(item) for item in plan.items}
        return plan

    def _copy(self, item: WriteItem) -> Tensor:
        tensor = super().resolve_data(item)
        assert isinstance(tensor, Tensor)
        # Not to pinned memory: a GPU copies to it faster, but torch would keep as much as weights and optimizer state
        # of the CPU's memory, every tensor rounded up to a power of two, until the end of the process.
        return tensor.detach().to("cpu", copy=True)

    def resolve_data(self, write_item: WriteItem) -> Any:
        return self._staged.pop(write_item.index)


@dataclass(frozen=True)
class ShardedPlan:
    """Which rank writes which tensor. All saves of a training have the same, as only the values change."""

    names: frozenset[str]  # of all tensors
    own: SavePlan  # of this rank
    metadata: Any  # torch's description of the whole checkpoint; only rank 0 has it


class ShardedState:
    """The state of one process, DDP or FSDP2. `write` uses no other rank and no live tensor: it may run in a thread."""

    def __init__(
        self,
        policy: torch.nn.Module,
        optimizer: torch.optim.Optimizer,
        folder: Path,
        plan: ShardedPlan | None = None,
    ) -> None:
        """Decide who writes what and copy this rank's part to CPU memory. Every rank calls this at the same step.

        plan: `self.plan` of an earlier save of this training, which ranks need not agree on again.
        """
        self._folder, self._planner = folder, _StagingPlanner()
        # What is written is in CPU memory already; to copy ahead would open a CUDA context on GPU 0 in the thread.
        self._writer = FileSystemWriter(folder, per_thread_copy_ahead=0)
        is_main_process = get_distributed().is_main_process
        self._planner.set_up_planner(_state(policy, optimizer), self._writer.storage_meta(), is_main_process)
        self._writer.set_up_storage_writer(is_main_process)
        # Every rank has the same names, so that all of them make a new plan or none does.
        names = frozenset(self._planner.state_dict)
        self.plan = plan if plan is not None and plan.names == names else self._agree(names)
        self._planner.finish_plan(self.plan.own)

    def _agree(self, names: frozenset[str]) -> ShardedPlan:
        """Return the plan of this rank. Every rank calls this."""
        ranks = get_distributed()
        local_plans = ranks.gather_objects(self._writer.prepare_local_plan(self._planner.create_local_plan()))
        plans, metadata = None, None
        if ranks.is_main_process:
            plans, metadata = self._planner.create_global_plan(local_plans)
            plans = self._writer.prepare_global_plan(plans)
        return ShardedPlan(names, ranks.broadcast_object(plans)[ranks.rank], metadata)

    def write(self) -> WrittenPart:
        if not self.plan.own.items:  # more ranks than tensors
            return WrittenPart({})
        index = self._writer.write_data(self.plan.own, self._planner).wait()
        names = sorted({result.storage_data.relative_path for result in index})
        return WrittenPart({name: file_digest(self._folder / name) for name in names}, index)

    def finish(self, parts: Sequence[WrittenPart]) -> dict[str, str]:
        self._writer.finish(self.plan.metadata, [part.index for part in parts])
        return {".metadata": file_digest(self._folder / ".metadata")}


class ShardedSaves:
    """Stages the state of one training for its checkpoints; ranks exchange their plans for the first one only."""

    def __init__(self) -> None:
        self._plan: ShardedPlan | None = None

    def stage(self, policy: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> ShardedState:
        """Return the state to be written; training waits meanwhile. Every rank calls this at the same step."""
        state = ShardedState(policy, optimizer, folder, self._plan)
        self._plan = state.plan
        return state


def load_sharded(policy: torch.nn.Module, optimizer: torch.optim.Optimizer, folder: Path) -> None:
    """Load what ShardedState has written, on every rank, into a policy of any of its strategies."""
    state = _state(policy, optimizer)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # a single process is meant to load alone
        dcp.load(state, storage_reader=FileSystemReader(folder), process_group=get_distributed().gloo_group)
    param_groups = get_state_dict(policy, optimizer, options=_OPTIONS)[1]["param_groups"]
    set_state_dict(
        policy,
        optimizer,
        model_state_dict=state["model"],
        optim_state_dict={"state": state["optimizer"], "param_groups": param_groups},
        options=_OPTIONS,
    )


def _state(policy: torch.nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return trained weights and state of the optimizer by parameter, without what the config says (learning rates)."""
    weights, optimizer_state = get_state_dict(policy, optimizer, options=_OPTIONS)
    trained: Any = optimizer_state["state"]
    return {"model": {name: weights[name] for name in trained}, "optimizer": trained}
