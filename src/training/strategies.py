"""engine.strategy -> the engine that trains with it."""

from __future__ import annotations

from src.config.schema import Lora, Training
from src.planning.resources import Resources
from src.training.accelerate_engine import AccelerateEngine
from src.training.engine import TrainingEngine
from src.training.fsdp_engine import FsdpEngine


def make_engine(resources: Resources, trainer: Training, lora: Lora | None, seed: int) -> TrainingEngine:
    """Return the engine of resources.strategy; `seed` is for initial adapters. Raises ConfigError as they do."""
    engine = FsdpEngine if resources.strategy == "fsdp" else AccelerateEngine
    return engine(resources, trainer, lora, seed)
