"""The grid of the toy experiment: learning rates are selected on some seeds, results reported on others."""

from __future__ import annotations

import io
import multiprocessing
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from dataclasses import asdict, fields, replace
from itertools import product
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import pandas as pd

from src.methods import METHODS
from src.planning.identity import digest
from src.store.files import atomic_write
from src.toy.settings import Toy, Training

if TYPE_CHECKING:
    from numpy.typing import NDArray

VERSION = 1  # raise it when training or testing changes: results of the old version are then not reused
Z95 = 1.96  # standard errors to either end of a 95 % interval
_SEEDS_PER_BATCH = 100  # trained together; their tensors stay in a core's cache


def run(toy: Toy, report: Callable[[str, int, int], None]) -> tuple[pd.DataFrame, pd.DataFrame]:
    """Return a table with a row per setting, at its best learning rate, and one with a row per bias and width.

    The second averages the objectives of a kind. Networks trained before are read from OUTPUT_DIR/toy/networks.
    """
    folder = Path(toy.output_dir) / "toy" / "networks"
    folder.mkdir(parents=True, exist_ok=True)
    names = {item.name for item in fields(Training)} & set(asdict(toy))
    common = {name: getattr(toy, name) for name in names}
    settings = [
        Training(objective, width, bias, lr=0.0, **common)
        for bias, width, objective in product(toy.biases, toy.widths, toy.objectives)
    ]
    with _Pool(toy.workers, folder, report) as pool:
        candidates = {replace(setting, lr=lr): range(toy.lr_seeds) for setting in settings for lr in toy.lrs}
        results = pool.train("toy: learning rates", candidates)
        best = [
            max((replace(setting, lr=lr) for lr in toy.lrs), key=lambda training: _mean(results[training]["accuracy"]))
            for setting in settings
        ]
        # Other seeds than those of the selection, or the luck of the selected learning rate would be reported too.
        final = pool.train("toy: networks", dict.fromkeys(best, range(toy.lr_seeds, toy.lr_seeds + toy.seeds)))
    kinds = [
        _by_kind([(setting, final[setting]) for setting in best if (setting.bias, setting.width) == group])
        for group in product(toy.biases, toy.widths)
    ]
    return pd.DataFrame([_row(setting, final[setting]) for setting in best]), pd.DataFrame(kinds)


def _mean(values: NDArray[np.float32]) -> float:
    return float(values.mean(dtype=np.float64))


def _row(setting: Training, results: dict[str, NDArray[Any]]) -> dict[str, Any]:
    alive = ~results["dead"]
    row: dict[str, Any] = {
        "bias": setting.bias,
        "width": setting.width,
        "objective": setting.objective,
        "kind": METHODS[setting.objective].kind,
        "lr": setting.lr,
        "seeds": len(alive),
        "dead": int((~alive).sum()),
    }
    row |= _mean_and_se("accuracy", results["accuracy"])
    row |= _mean_and_se("accuracy_alive", results["accuracy"][alive])
    row |= _mean_and_se("icc1", results["icc"][alive])
    return row


def _by_kind(group: list[tuple[Training, dict[str, NDArray[Any]]]]) -> dict[str, Any]:
    """Return the means of pairwise and pointwise objectives, and their difference, paired by seed.

    A seed has the same data and initial weights under every objective. icc1 is averaged over the seeds whose network is
    alive under all of them.
    """
    row: dict[str, Any] = {"bias": group[0][0].bias, "width": group[0][0].width}
    alive = ~np.any([results["dead"] for _, results in group], axis=0)
    row |= {"seeds": len(alive), "alive": int(alive.sum())}
    for name, key, mask in (("accuracy", "accuracy", slice(None)), ("icc1", "icc", alive)):
        means = {}
        for kind in ("pairwise", "pointwise"):
            values = [
                results[key][mask].astype(np.float64) for t, results in group if METHODS[t.objective].kind == kind
            ]
            means[kind] = np.mean(values, axis=0) if values else np.full(len(alive[mask]), np.nan)
            row |= _mean_and_se(f"{name}_{kind}", means[kind])
        row |= _mean_and_se(f"{name}_difference", means["pairwise"] - means["pointwise"])
    return row


def _mean_and_se(name: str, values: NDArray[Any]) -> dict[str, float]:
    n = len(values)
    mean = float(values.mean(dtype=np.float64)) if n else float("nan")
    return {name: mean, f"{name}_se": float(values.std(ddof=1, dtype=np.float64)) / n**0.5 if n > 1 else float("nan")}


class _Pool:
    """Processes that train networks, one core each."""

    def __init__(self, workers: int | None, folder: Path, report: Callable[[str, int, int], None]) -> None:
        self.folder, self.report = folder, report
        context = multiprocessing.get_context("spawn")  # torch's threads do not survive a fork
        self._pool = ProcessPoolExecutor(workers, mp_context=context)

    def __enter__(self) -> _Pool:
        return self

    def __exit__(self, *exc: object) -> None:
        self._pool.shutdown(cancel_futures=True)

    def train(self, label: str, seeds_of: dict[Training, range]) -> dict[Training, dict[str, NDArray[Any]]]:
        """Return the results of every training, (seeds,) each, computing those that are not on disk."""
        parts = {(t, part): self._path(t, part) for t, seeds in seeds_of.items() for part in _batches(seeds)}
        missing = [key for key, path in parts.items() if not path.exists()]
        futures: list[Future[None]] = [self._pool.submit(_train, *key, parts[key]) for key in missing]
        self.report(label, 0, len(missing))
        for done, future in enumerate(as_completed(futures), start=1):
            future.result()
            self.report(label, done, len(missing))
        results: dict[Training, list[dict[str, NDArray[Any]]]] = {}
        for (training, _), path in parts.items():
            with np.load(path) as file:
                results.setdefault(training, []).append(dict(file))
        return {
            training: {name: np.concatenate([part[name] for part in parts_read]) for name in parts_read[0]}
            for training, parts_read in results.items()
        }

    def _path(self, training: Training, seeds: range) -> Path:
        inputs = {**asdict(training), "seeds": [seeds.start, seeds.stop], "version": VERSION}
        return self.folder / f"{digest(inputs)}.npz"


def _batches(seeds: range) -> Iterator[range]:
    for start in range(seeds.start, seeds.stop, _SEEDS_PER_BATCH):
        yield range(start, min(start + _SEEDS_PER_BATCH, seeds.stop))


def _train(training: Training, seeds: range, path: Path) -> None:
    """Train and test the networks of some seeds in a process of the pool, and write their results."""
    import torch

    from src.toy.networks import train

    torch.set_num_threads(1)
    results, buffer = train(training, seeds), io.BytesIO()
    np.savez(buffer, accuracy=results["accuracy"], icc=results["icc"], dead=results["dead"])
    atomic_write(path, buffer.getvalue())  # another study may train the same network
