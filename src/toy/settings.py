"""The settings of the toy experiment, and which can be trained. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from src.errors import ConfigError
from src.methods import METHODS

# On a scalar score DPO, SimPO (its margin aside) and ORPO are one objective; ASFT reads the score as log odds.
OBJECTIVES = ("dpo", "ipo", "apo_zero", "nca", "cal_dpo", "asft")
OPTIMIZERS = ("adam", "sgd")


@dataclass
class Toy:
    """The schema of conf/toy.yaml, which explains the keys."""

    output_dir: str = "outputs"
    objectives: list[str] = field(default_factory=list)
    widths: list[int] = field(default_factory=list)
    biases: list[float] = field(default_factory=list)
    lrs: list[float] = field(default_factory=list)
    lr_seeds: int = 100
    seeds: int = 1000
    beta: float = 1.0
    prompts: int = 2000
    train_fraction: float = 0.8
    epochs: int = 100
    batch_size: int = 64
    optimizer: str = "adam"
    workers: int | None = None


@dataclass(frozen=True)
class Training:
    """The settings of one network; its results depend on these and its seed."""

    objective: str
    width: int
    bias: float
    lr: float
    beta: float
    prompts: int
    train_fraction: float
    epochs: int
    batch_size: int
    optimizer: str


def check(toy: Toy) -> None:
    """Raise ConfigError for settings that cannot be trained."""
    for name in ("objectives", "widths", "biases", "lrs"):
        values = getattr(toy, name)
        if not values:
            raise ConfigError(f"{name}: an empty list; {name}=[...] with at least one value")
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}={values}: has a value twice")
    for name in toy.objectives:
        if name not in OBJECTIVES:
            same = " (on a scalar score it is dpo)" if METHODS.keys() & {name} else ""
            raise ConfigError(f"objectives: {name}{same} is not one of {', '.join(OBJECTIVES)}")
    if toy.optimizer not in OPTIMIZERS:
        raise ConfigError(f"optimizer={toy.optimizer}: must be one of {', '.join(OPTIMIZERS)}")
    for name in ("lr_seeds", "seeds", "epochs", "batch_size", "workers"):
        value = getattr(toy, name)
        if value is not None and value < 1:
            raise ConfigError(f"{name}={value}: at least 1")
    for name in ("widths", "lrs"):
        if min(getattr(toy, name)) <= 0:
            raise ConfigError(f"{name}={getattr(toy, name)}: all above 0")
    if toy.beta <= 0:
        raise ConfigError(f"beta={toy.beta}: above 0")
    split = round(toy.train_fraction * toy.prompts)
    if not 0 < split < toy.prompts - 1:
        raise ConfigError(
            f"prompts={toy.prompts}, train_fraction={toy.train_fraction}: {split} prompts train and "
            f"{toy.prompts - split} test; at least 1 and 2 are needed"
        )
