"""How many processes may compute a stage together."""

from __future__ import annotations

from src.config.schema import Point
from src.errors import ConfigError


def check_num_processes(point: Point, kind: str, num_processes: int, where: str, remedy: str) -> None:
    """Raise ConfigError unless the point's engine and batch size suit the number of processes of such a stage.

    kind: sft, align, ... where: what decides the number, for messages; remedy: what makes it 1.
    """
    if kind in ("sft", "align"):
        batch_size = getattr(point.trainer, kind).batch_size
        if batch_size < num_processes:
            raise ConfigError(
                f"trainer.{kind}.batch_size={batch_size}: below the {num_processes} processes that compute {kind}, each"
                f" of which needs an example per step; lower {where}"
            )
    if num_processes > 1 and point.engine.strategy == "none":
        raise ConfigError(
            f"{where}: {kind} is computed by {num_processes} processes, but engine={point.engine.name} uses one:"
            f" choose engine=fsdp, or {remedy}"
        )
