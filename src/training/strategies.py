"""engine.strategy -> the engine that trains with it."""

from __future__ import annotations

from src.config.schema import Lora, Training
from src.distributed import init_distributed
from src.planning.resources import Resources
from src.training.accelerate_engine import AccelerateEngine
from src.training.engine import TrainingEngine
from src.training.fsdp_engine import FsdpEngine
from src.training.one_process_engine import OneProcessEngine


def make_engine(resources: Resources, trainer: Training, lora: Lora | None, seed: int) -> TrainingEngine:
    """Return the engine of resources.strategy; `seed` is for initial adapters. Raises ConfigError as they do."""
    if resources.strategy != "fsdp":
        engine: type[TrainingEngine] = AccelerateEngine
    else:
        engine = FsdpEngine if init_distributed("fsdp").size > 1 else OneProcessEngine
    return engine(resources, trainer, lora, seed)
