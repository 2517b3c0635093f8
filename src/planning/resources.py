"""What a stage uses and its results do not depend on, except for rounding: devices, budgets, addresses, limits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

from src.config.fields import select_fields
from src.config.judge import JudgeEndpoint
from src.config.judge_rules import num_turns
from src.config.schema import GENERATED, Point
from src.planning.identity import DataInputs


@dataclass(frozen=True)
class Resources:
    """See `conf/engine`, `conf/trainer`, `conf/server` and `conf/judge` for the meaning and unit of each field."""

    device: str = "auto"
    strategy: str = "none"
    cpu_threads: int | None = None
    activation_checkpointing: bool | str = "auto"
    compile: bool = False
    fused: bool | str = "auto"
    deterministic: bool = False
    attention: str = "auto"
    max_tokens_per_micro_batch: int | None = None
    checkpoint_minutes: float = 20.0
    sampling_batch_size: int = 64
    capability_batch_size: int = 8
    server_timeout: float = 600.0
    server_concurrency: int = 64
    judge: JudgeEndpoint = field(default_factory=JudgeEndpoint)
    max_sequence_tokens: int = 1024  # of training and sampling; a model with fewer positions is refused when loaded
    min_validation_prompts: int = 1  # distinct ones; fewer are refused before training
    pairs: DataInputs | None = None  # read once before SFT, so that a broken row is found before hours of training
    expected_rows: Mapping[str, Mapping[str, int]] = field(default_factory=dict)  # table -> split -> rows, to warn

    @property
    def zero_stage(self) -> int:
        """1, 2 or 3 for DeepSpeed ZeRO, 0 otherwise."""
        return int(self.strategy[4]) if self.strategy.startswith("zero") else 0


class KeptWhole(NamedTuple):
    """What FSDP2 keeps of the whole model from one micro-batch of a step to the next."""

    weights: bool  # gathered ones, so that only the first micro-batch gathers
    gradients: bool  # of this rank's examples, so that only the last micro-batch exchanges them


_MOST_KEPT = 0.6  # of a device: what a process holds of the model; the rest is for activations


def fsdp_keeps_whole(num_parameters: int, num_processes: int, device_bytes: int) -> KeptWhole:
    """Return what FSDP2 keeps whole on several processes.

    A process's share of weights, gradients and Adam's moments (16 bytes a parameter) and what is kept may
    take _MOST_KEPT of a device: weights in bf16 (2 bytes: 8B on eight of 80 GB), and with them gradients in float32
    (4 bytes: 3B on two of 80 GB).
    """
    share, most = 16 * num_parameters / num_processes, _MOST_KEPT * device_bytes
    return KeptWhole(share + 2 * num_parameters <= most, share + 6 * num_parameters <= most)


def resources_of(point: Point, pairs: DataInputs) -> Resources:
    """Return the resources of every stage of a point."""
    data, generation = point.dataset, point.evaluation.generation
    return select_fields(
        Resources,
        point.engine,
        attention=point.model.attention,
        max_tokens_per_micro_batch=point.trainer.max_tokens_per_micro_batch,
        checkpoint_minutes=point.trainer.checkpoint_minutes,
        sampling_batch_size=generation.batch_size,
        capability_batch_size=point.capability.batch_size,
        server_timeout=point.server.timeout,
        server_concurrency=point.server.concurrency,
        judge=select_fields(JudgeEndpoint, point.judge),
        max_sequence_tokens=max_sequence_tokens(point),
        min_validation_prompts=2 if splits_validation_prompts(point) else 1,
        pairs=pairs,
        expected_rows={key: table.rows for name in ("sft", "preference") for key, table in data.tables(name)},
    )


def max_sequence_tokens(point: Point) -> int:
    """Return the tokens of the longest sequence that training and sampling may have."""
    data, candidates, new_tokens = point.dataset, point.pairs.generation, point.evaluation.generation.max_new_tokens
    sampled = prompt_limit(data.max_prompt_tokens, new_tokens, num_turns(point)) + new_tokens
    of_pairs = 0 if candidates is None else data.max_prompt_tokens + candidates.max_new_tokens
    return max(data.max_tokens, sampled, of_pairs)


def prompt_limit(max_prompt_tokens: int, max_new_tokens: int, turn: int) -> int:
    """Return the tokens that the prompt of a turn may have, from 1: with all turns before, and the answers to them."""
    return turn * max_prompt_tokens + (turn - 1) * max_new_tokens


def splits_validation_prompts(point: Point) -> bool:
    """Return whether prompts of validation pairs are split into selection and reporting, which need one each."""
    own_prompts = point.evaluation.prompts_file is not None or point.dataset.source in GENERATED
    return point.evaluation.metric == "reward_accuracy" or not own_prompts
