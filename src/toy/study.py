"""The grid of the toy experiment: learning rates are selected on some seeds, results reported on others."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import asdict, dataclass, fields, replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import torch
from numpy.typing import NDArray
from omegaconf import MISSING

from src.config.fields import check_value, choice, number, select_fields
from src.errors import ConfigError
from src.methods import METHODS
from src.planning.content import digest
from src.store.files import atomic_write
from src.toy.networks import OBJECTIVES, OPTIMIZERS, NetworkSettings, train

VERSION = 1  # raise it when training or testing changes: results of the old version are then not reused
Z95 = 1.96  # standard errors to either end of a 95 % interval
_SEEDS_PER_BATCH = 100  # trained together; their tensors stay in a core's cache


@dataclass
class Toy:
    """The schema of conf/toy.yaml, which explains the keys."""

    output_dir: str = MISSING
    objectives: list[str] = MISSING
    widths: list[int] = number(minimum=1, maximum=10**5)
    biases: list[float] = number(minimum=-1000, maximum=1000)
    lrs: list[float] = number(above=0, maximum=1e6)
    lr_seeds: int = number(minimum=1, maximum=10**6)
    seeds: int = number(minimum=1, maximum=10**6)
    beta: float = number(above=0, maximum=1e6)
    prompts: int = number(minimum=20, maximum=10**7)
    train_fraction: float = number(minimum=0.1, maximum=0.9)  # with 20 prompts at least 2 to train and 2 to test
    epochs: int = number(minimum=1, maximum=10**6)
    batch_size: int = number(minimum=1, maximum=10**6)
    optimizer: str = choice(*OPTIMIZERS)
    workers: int | None = number(minimum=1, maximum=1024)


def check(toy: Toy) -> None:
    """Raise ConfigError for settings that cannot be trained."""
    for spec in fields(toy):
        value = getattr(toy, spec.name)
        check_value(spec.name, spec, value)
        if isinstance(value, list) and not value:
            raise ConfigError(f"{spec.name}: an empty list; {spec.name}=[...] with at least one value")
        if isinstance(value, list) and len(set(value)) < len(value):
            raise ConfigError(f"{spec.name}={value}: has a value twice")
    for name in toy.objectives:
        if name not in OBJECTIVES:
            is_dpo = name in METHODS and METHODS[name].loss in ("logistic", "simpo")
            same = " (on a scalar score it is dpo)" if is_dpo else ""
            raise ConfigError(f"objectives: {name}{same} is not one of {', '.join(OBJECTIVES)}")


def run(toy: Toy, report: Callable[[str, int, int], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a table with a row per setting, at its best learning rate, and one with a row per bias and width.

    The second averages the objectives of a kind. Networks trained before are read from OUTPUT_DIR/toy/networks.
    """
    settings = [
        select_fields(NetworkSettings, toy, objective=objective, width=width, bias=bias, lr=0.0)
        for bias, width, objective in product(toy.biases, toy.widths, toy.objectives)
    ]
    candidates = {setting: [replace(setting, lr=lr) for lr in toy.lrs] for setting in settings}
    all_trainings = [training for trainings in candidates.values() for training in trainings]
    selection = _train_all("toy: learning rates", all_trainings, range(toy.lr_seeds), toy, report)
    best = [
        max(trainings, key=lambda training: _mean(selection[training]["accuracy"])) for trainings in candidates.values()
    ]
    # Other seeds than those of the selection, or the luck of the selected learning rate would be reported too.
    final = _train_all("toy: networks", best, range(toy.lr_seeds, toy.lr_seeds + toy.seeds), toy, report)
    kinds = [
        {"bias": bias, "width": width}
        | _by_kind({t.objective: final[t] for t in best if (t.bias, t.width) == (bias, width)})
        for bias, width in product(toy.biases, toy.widths)
    ]
    return pd.DataFrame([_row(training, final[training]) for training in best]), pd.DataFrame(kinds)


def _row(training: NetworkSettings, results: dict[str, NDArray[Any]]) -> dict[str, Any]:
    alive = ~results["dead"]
    return {
        "bias": training.bias,
        "width": training.width,
        "objective": training.objective,
        "kind": METHODS[training.objective].kind,
        "lr": training.lr,
        "seeds": len(alive),
        "dead": int((~alive).sum()),
        **_mean_and_se("accuracy", results["accuracy"]),
        **_mean_and_se("accuracy_alive", results["accuracy"][alive]),
        **_mean_and_se("icc1", results["icc"][alive]),
    }


def _by_kind(group: dict[str, dict[str, NDArray[Any]]]) -> dict[str, Any]:
    """Return the means of pairwise and pointwise objectives, and their difference, paired by seed.

    group: objective -> results. A seed has the same data and initial weights under every objective. icc1 is averaged
    over the seeds whose network is alive under all of them.
    """
    alive = ~np.any([results["dead"] for results in group.values()], axis=0)
    row: dict[str, Any] = {"seeds": len(alive), "alive": int(alive.sum())}
    for name, key, counted in (("accuracy", "accuracy", np.ones_like(alive)), ("icc1", "icc", alive)):
        means = {}
        for kind in ("pairwise", "pointwise"):
            values = [results[key][counted].astype(float) for o, results in group.items() if METHODS[o].kind == kind]
            means[kind] = np.mean(values, axis=0) if values else np.full(counted.sum(), np.nan)
            row |= _mean_and_se(f"{name}_{kind}", means[kind])
        row |= _mean_and_se(f"{name}_difference", means["pairwise"] - means["pointwise"])
    return row


def _mean_and_se(name: str, values: NDArray[Any]) -> dict[str, float]:
    n = len(values)
    se = float(values.std(ddof=1, dtype=np.float64)) / n**0.5 if n > 1 else float("nan")
    return {name: _mean(values) if n else float("nan"), f"{name}_se": se}


def _mean(values: NDArray[Any]) -> float:
    return float(values.mean(dtype=np.float64))


def _train_all(
    label: str, trainings: list[NetworkSettings], seeds: range, toy: Toy, report: Callable[[str, int, int], None]
) -> dict[NetworkSettings, dict[str, NDArray[Any]]]:
    """Return the results of every training, (seeds,) each, computing those that are not on disk, one core each."""
    folder = Path(toy.output_dir) / "toy" / "networks"
    folder.mkdir(parents=True, exist_ok=True)
    files = {(t, part): folder / _file_name(t, part) for t in trainings for part in _batches(seeds)}
    missing = {key: file for key, file in files.items() if not file.exists()}
    context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
    pool = ProcessPoolExecutor(toy.workers, context, initializer=torch.set_num_threads, initargs=(1,))
    try:
        futures = [pool.submit(_train, *key, file) for key, file in missing.items()]
        report(label, 0, len(missing))
        for num_done, future in enumerate(as_completed(futures), start=1):
            future.result()
            report(label, num_done, len(missing))
    finally:
        pool.shutdown(cancel_futures=True)
    results = {}
    for training in trainings:
        parts = []
        for part in _batches(seeds):
            with np.load(files[training, part]) as file:
                parts.append(dict(file))
        results[training] = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]}
    return results


def _file_name(training: NetworkSettings, seeds: range) -> str:
    return digest({**asdict(training), "seeds": [seeds.start, seeds.stop], "version": VERSION}) + ".npz"


def _batches(seeds: range) -> list[range]:
    return [seeds[start : start + _SEEDS_PER_BATCH] for start in range(0, len(seeds), _SEEDS_PER_BATCH)]


def _train(training: NetworkSettings, seeds: range, file: Path) -> None:
    """Train and test the networks of some seeds in a process of the pool, and write their results."""
    results, buffer = train(training, seeds), io.BytesIO()
    np.savez(buffer, accuracy=results["accuracy"], icc=results["icc"], dead=results["dead"])
    atomic_write(file, buffer.getvalue())  # another study may train the same network
