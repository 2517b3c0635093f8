"""The GPU that a plan is compared with: the one `engine.gpu` names, else the one of this machine. No torch."""

from __future__ import annotations

from functools import lru_cache
from pathlib import Path

from src.config.schema import Engine
from src.planning.gpus import Gpu, find_device, find_gpu

_DRIVER = Path("/proc/driver/nvidia/gpus")


def card_of(engine: Engine) -> Gpu | None:
    """Return the card that stages of this engine are compared with; None on a CPU, or where none is known.

    Raises ConfigError for a name that conf/gpus.yaml does not have.
    """
    if engine.gpu is not None:
        return find_gpu(engine.gpu)
    return None if engine.device == "cpu" else _card_of_machine(_DRIVER)


@lru_cache
def _card_of_machine(driver: Path) -> Gpu | None:
    """Return the card that NVIDIA's driver lists first, where conf/gpus.yaml has it."""
    for file in sorted(driver.glob("*/information")):
        model = next((line for line in file.read_text(encoding="utf-8").lower().splitlines() if "model:" in line), "")
        if (gpu := find_device(model)) is not None:
            return gpu
    return None
