"""What a plan takes on disk when that is most: published models, and checkpoints to resume from. No torch.

Bytes are NaN for a model of unknown shape.
"""

from __future__ import annotations

import math
import shutil
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

from src.config.schema import Point
from src.planning.fit import num_adapter_parameters
from src.planning.model_shape import model_shape
from src.planning.plan import Plan
from src.planning.stage import Stage
from src.store.store import Store

_DTYPE_BYTES = {"float32": 4, "bfloat16": 2}
_CHECKPOINT_BYTES = 12  # per trained parameter: weight and two moments of Adam in float32


@dataclass(frozen=True)
class Disk:
    """The most that the models of the stages to run take."""

    num_models: int  # on disk at once, SFT included
    num_in_all: int  # that are computed
    model_bytes: float  # of these on disk at once
    partial_bytes: float  # of the checkpoints of all partial runs, one of which a longer run may resume from
    checkpoint_bytes: float  # of a training that runs


def disk_of(plan: Plan, num_running: int) -> Disk | None:
    """Return what the stages that a plan needs take; None without a model. num_running: points computed at once."""
    stages = [stage for identity, stage in plan.stages.items() if identity in plan.needed]
    initial = [published_bytes(stage) for stage in stages if stage.kind == "sft"]
    aligned = [stage for stage in stages if stage.kind == "align"]
    if not initial and not aligned:
        return None
    sizes = sorted(map(published_bytes, aligned), reverse=True)
    at_once = min(len(aligned), _max_aligned(plan.points, num_running) or len(aligned))
    return Disk(
        num_models=len(initial) + at_once,
        num_in_all=len(initial) + len(aligned),
        model_bytes=sum(initial) + sum(sizes[:at_once]),
        partial_bytes=sum(_checkpoint_bytes(stage) for stage in aligned if stage.stop_fraction < 1),
        checkpoint_bytes=max(map(_checkpoint_bytes, aligned or stages)),
    )


def _max_aligned(points: Sequence[Point], num_running: int) -> int | None:
    """Return how many aligned models are on disk at once by `keep_checkpoints`, at most; None for no bound."""
    first, is_sweep = points[0], len(points) > 1
    if first.keep_checkpoints == "none":
        return num_running
    if first.keep_checkpoints == "all" or first.sweep.select != "best" or not is_sweep:
        return None  # a shortlist may be of any size
    studies = {p.study for p in points}
    seeds = Counter(p.without_seed for p in points)
    # Where several seeds make a point, all of a selected one stay, and those of one that is not complete yet.
    return (len(studies) + num_running) * max(seeds.values())


def published_bytes(stage: Stage) -> float:
    """Return the bytes of the model, or of the adapters, that a stage publishes."""
    shape, model = model_shape(stage.point.model.path, stage.point.model.revision), stage.point.model
    if shape is None:
        return math.nan
    if stage.kind == "sft":
        return _DTYPE_BYTES["float32"] * shape.num_parameters
    is_adapter = model.lora.rank is not None and model.lora.publish == "adapter"
    number = num_adapter_parameters(shape, model.lora) if is_adapter else shape.num_parameters
    return _DTYPE_BYTES[model.save_dtype] * number


def _checkpoint_bytes(stage: Stage) -> float:
    shape, lora = model_shape(stage.point.model.path, stage.point.model.revision), stage.point.model.lora
    if shape is None:
        return math.nan
    return _CHECKPOINT_BYTES * (shape.num_parameters if lora.rank is None else num_adapter_parameters(shape, lora))


def free_bytes(store: Store) -> int:
    """Return the bytes that are free where the store is, or will be."""
    return shutil.disk_usage(next(path for path in (store.root, *store.root.parents) if path.exists())).free


def bytes_text(number: float) -> str:
    """Return a number of bytes as `2.24 MB`, NaN as "-"."""
    text = number_text(number)
    return text if math.isnan(number) else f"{text}B" if text[-1].isalpha() else f"{text} B"


def number_text(number: float) -> str:
    """Return a number as `249 M`, NaN as "-"."""
    for size, prefix in ((1e12, "T"), (1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.3g} {prefix}"
    return "-" if math.isnan(number) else f"{number:.3g}"
