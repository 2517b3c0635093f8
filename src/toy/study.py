"""The grid of the toy experiment: the learning rate of each setting by some seeds, what it reaches by others."""

from __future__ import annotations

import multiprocessing
import os
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from src.errors import ConfigError
from src.methods import METHODS
from src.planning.identity import digest

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1  # raise it when a network trains or is tested differently: kept ones are then not its own any more
REACH = 1.96  # standard errors to either end of a 95 % interval
# On a scalar score DPO, SimPO (its margin aside) and ORPO are one objective; ASFT reads the score as log odds.
OBJECTIVES = ("dpo", "ipo", "apo_zero", "nca", "cal_dpo", "asft")
OPTIMISERS = ("adam", "sgd")
_TOGETHER = 100  # seeds: their tensors then stay in a core's cache


@dataclass
class Toy:
    """conf/toy.yaml says what each is."""

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
    """What a network's numbers depend on, besides its seed."""

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
    """Raises ConfigError for what cannot be trained."""
    for name in ("objectives", "widths", "biases", "lrs"):
        values = getattr(toy, name)
        if not values:
            raise ConfigError(f"{name}: an empty list; {name}=[...] with at least one value")
        if len(set(values)) < len(values):
            raise ConfigError(f"{name}={values}: a value stands there twice")
    for name in toy.objectives:
        if name not in OBJECTIVES:
            same = " (on a scalar score it is dpo)" if METHODS.keys() & {name} else ""
            raise ConfigError(f"objectives: {name}{same} is none of {', '.join(OBJECTIVES)}")
    if toy.optimizer not in OPTIMISERS:
        raise ConfigError(f"optimizer={toy.optimizer}: one of {', '.join(OPTIMISERS)}")
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


def run(toy: Toy, report: Callable[[str, int, int], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """One row a setting, at its best learning rate; and one a width and bias, where the objectives of a kind are
    averaged. Networks trained before are read from OUTPUT_DIR/toy/networks."""
    folder = Path(toy.output_dir) / "toy" / "networks"
    folder.mkdir(parents=True, exist_ok=True)
    names = {item.name for item in fields(Training)} & set(asdict(toy))
    common = {name: getattr(toy, name) for name in names}
    settings = [
        Training(objective, width, bias, lr=0.0, **common)
        for bias, width, objective in product(toy.biases, toy.widths, toy.objectives)
    ]
    with _Pool(toy.workers, folder, report) as pool:
        tried = {replace(setting, lr=lr): range(toy.lr_seeds) for setting in settings for lr in toy.lrs}
        found = pool.train("toy: learning rates", tried)
        best = [max((replace(s, lr=lr) for lr in toy.lrs), key=lambda t: _mean(found[t]["accuracy"])) for s in settings]
        # Other seeds than those that chose: a learning rate that was lucky there is not here.
        final = pool.train("toy: networks", dict.fromkeys(best, range(toy.lr_seeds, toy.lr_seeds + toy.seeds)))
    kinds = [
        _by_kind([(setting, final[setting]) for setting in best if (setting.bias, setting.width) == place])
        for place in product(toy.biases, toy.widths)
    ]
    return pd.DataFrame([_row(setting, final[setting]) for setting in best]), pd.DataFrame(kinds)


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean(dtype=np.float64))


def _row(setting: Training, found: dict[str, NDArray[Any]]) -> dict[str, Any]:
    alive = ~found["dead"]
    row: dict[str, Any] = {
        "bias": setting.bias,
        "width": setting.width,
        "objective": setting.objective,
        "kind": METHODS[setting.objective].kind,
        "lr": setting.lr,
        "seeds": len(alive),
        "dead": int((~alive).sum()),
    }
    for name, own in (
        ("accuracy", found["accuracy"]),
        ("accuracy_alive", found["accuracy"][alive]),
        ("icc1", found["icc"][alive]),
    ):
        row |= _average(name, own)
    return row


def _by_kind(group: list[tuple[Training, dict[str, NDArray[Any]]]]) -> dict[str, Any]:
    """pairwise minus pointwise, seed by seed: a seed has the same data and first weights under every objective. icc1 is
    of the seeds that live under all of them."""
    row: dict[str, Any] = {"bias": group[0][0].bias, "width": group[0][0].width}
    alive = ~np.any([found["dead"] for _, found in group], axis=0)
    row |= {"seeds": len(alive), "alive": int(alive.sum())}
    for name, key, kept in (("accuracy", "accuracy", slice(None)), ("icc1", "icc", alive)):
        means = {}
        for kind in ("pairwise", "pointwise"):
            own = [found[key][kept].astype(np.float64) for t, found in group if METHODS[t.objective].kind == kind]
            means[kind] = np.mean(own, axis=0) if own else np.full(len(alive[kept]), np.nan)
            row |= _average(f"{name}_{kind}", means[kind])
        row |= _average(f"{name}_difference", means["pairwise"] - means["pointwise"])
    return row


def _average(name: str, values: NDArray[Any]) -> dict[str, float]:
    n = len(values)
    mean = float(values.mean(dtype=np.float64)) if n else float("nan")
    return {name: mean, f"{name}_se": float(values.std(ddof=1, dtype=np.float64)) / n**0.5 if n > 1 else float("nan")}


class _Pool:
    """Processes that train networks, each on a core of its own."""

    def __init__(self, workers: int | None, folder: Path, report: Callable[[str, int, int], None]) -> None:
        self.folder, self.report = folder, report
        context = multiprocessing.get_context("spawn")  # torch's threads do not live through a fork
        self._pool = ProcessPoolExecutor(workers, mp_context=context)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def train(self, label: str, wanted: dict[Training, range]) -> dict[Training, dict[str, NDArray[Any]]]:
        parts = {(t, part): self._path(t, part) for t, seeds in wanted.items() for part in _parts(seeds)}
        missing = [key for key, path in parts.items() if not path.exists()]
        futures: list[Future[None]] = [self._pool.submit(_train, *key, parts[key]) for key in missing]
        self.report(label, 0, len(missing))
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            self.report(label, done, len(missing))
        found: dict[Training, list[dict[str, NDArray[Any]]]] = {}
        for (training, _), path in parts.items():
            with np.load(path) as file:
                found.setdefault(training, []).append(dict(file))
        return {
            training: {name: np.concatenate([own[name] for own in read]) for name in read[0]}
            for training, read in found.items()
        }

    def _path(self, training: Training, seeds: range) -> Path:
        own = {**asdict(training), "seeds": [seeds.start, seeds.stop], "version": VERSION}
        return self.folder / f"{digest(own)}.npz"


def _parts(seeds: range) -> Iterator[range]:
    for start in range(seeds.start, seeds.stop, _TOGETHER):
        yield range(start, min(start + _TOGETHER, seeds.stop))


def _train(training: Training, seeds: range, path: Path) -> None:
    """In a process of the pool."""
    import torch

    from src.toy.networks import train

    torch.set_num_threads(1)
    found = train(training, seeds)
    draft = path.with_name(f".{os.getpid()}-{path.name}")  # two studies may train the same network
    np.savez(draft, accuracy=found["accuracy"], icc=found["icc"], dead=found["dead"])
    draft.replace(path)
