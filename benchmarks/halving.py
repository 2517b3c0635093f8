"""Compare successive halving with the full grid in result and cost: `python -m benchmarks.halving`.

Three methods, each over its six betas and two learning rates of the embedded setup: 36 points. SFT, reference and
baseline are computed once and copied, so that both searches are charged only for their points. Takes ten minutes on
two cores that are also used otherwise.
"""

from __future__ import annotations

import resource
import shutil
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pandas as pd
import yaml

from src.store.store import METRICS_FILE, Store
from src.store.sweep_folder import SweepFolder

GRID = ["method=dpo,simpo,orpo", "beta=grid", "lr=5e-4,1e-3"]


@dataclass
class Outcome:
    """What one search selected, and its cost without the stages that all points share."""

    best: dict[str, dict[str, Any]]  # method -> the selected row of points.csv
    points: pd.DataFrame
    steps: int  # of alignment
    evaluations: int  # models sampled and evaluated
    seconds: float  # wall time of the command on this machine
    cpu_seconds: float  # of all its processes


def train(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "src.train", *arguments, "tracking=none"], check=True, stdout=subprocess.DEVNULL
    )


def search(output_dir: Path, shared: Path, kind: str) -> Outcome:
    """Run the grid with sweep.search=kind in a copy of the shared stages."""
    shutil.copytree(shared / "store", output_dir / "store")
    store, folder = Store(output_dir), SweepFolder(output_dir / "sweeps" / "search")
    evaluated = len(list(store.root.glob("evaluate/*/DONE")))
    wall, cpu = time.perf_counter(), cpu_of_children()
    train("-m", *GRID, f"sweep.search={kind}", f"sweep.name={folder.name}", f"output_dir={output_dir}")
    wall, cpu = time.perf_counter() - wall, cpu_of_children() - cpu
    # The metrics of a resumed run include the steps of its shorter runs.
    runs = {point["stages"]["align"] for point in folder.read()["points"]}
    steps = sum(
        len((store.root / "align" / run / METRICS_FILE).read_text(encoding="utf-8").splitlines()) for run in runs
    )
    points = pd.read_csv(folder.points_csv).set_index("identity", drop=False)
    selected = yaml.safe_load(folder.best_yaml.read_text(encoding="utf-8"))["mini_tldr"]
    best = {method: points.loc[entry["identities"][0]].to_dict() for method, entry in selected.items()}
    evaluations = len(list(store.root.glob("evaluate/*/DONE"))) - evaluated
    return Outcome(best, points, steps, evaluations, wall, cpu)


def cpu_of_children() -> float:
    usage = resource.getrusage(resource.RUSAGE_CHILDREN)
    return usage.ru_utime + usage.ru_stime


def describe(row: dict[str, Any]) -> str:
    point = f"beta {row['beta']:g} lr {row['lr']:g}"
    return f"{point:22} {row['quality_selection']:.3f} {row['quality_reporting']:.3f}"


def main() -> int:
    with tempfile.TemporaryDirectory() as folder:
        shared = Path(folder) / "shared"
        train("method=dpo", "trainer.align.max_steps=1", f"output_dir={shared}")  # of which no point uses the model
        grid, halving = (search(Path(folder) / kind, shared, kind) for kind in ("grid", "successive_halving"))
    print(f"{'':8} {'grid: selection, reporting split':36}  {'successive_halving: the same':36}  rank in the grid")
    for method, row in grid.best.items():
        points, other = grid.points[grid.points.method == method], halving.best[method]
        rank = 1 + int((points.quality_selection > points.quality_selection[other["identity"]]).sum())
        print(f"{method:8} {describe(row):36}  {describe(other):36}  {rank} of {len(points)}")
    print(f"{'':24} {'grid':>9} {'successive_halving':>18}  ratio")
    for name in ("steps", "evaluations", "seconds", "cpu_seconds"):
        full, part = getattr(grid, name), getattr(halving, name)
        print(f"{name:24} {full:9.0f} {part:18.0f} {100 * part / full:5.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
