"""What a search by halving finds and takes, beside the full grid: `python -m benchmarks.halving`.

Three methods, each over its six betas and two learning rates of the embedded setup: 36 points. SFT, reference and
baseline are computed once and copied, so that both searches take what their points take. Ten minutes on two
cores that others use, too.
"""

from __future__ import annotations

import json
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

GRID = ["method=dpo,simpo,orpo", "beta=grid", "lr=5e-4,1e-3"]


@dataclass
class Found:
    """What one search has found, and what it took beyond the stages that all points share."""

    best: dict[str, dict[str, Any]]  # method -> the row of points.csv that was chosen
    points: pd.DataFrame
    steps: int  # of alignment
    sampled: int  # models that were sampled and evaluated
    seconds: float  # from command to report, on this machine
    cpu: float  # seconds of all its processes


def train(*arguments: str) -> None:
    subprocess.run(
        [sys.executable, "-m", "src.train", *arguments, "tracking=none"], check=True, stdout=subprocess.DEVNULL
    )


def search(folder: Path, shared: Path, kind: str) -> Found:
    shutil.copytree(shared / "store", folder / "store")
    evaluated = len(list(folder.glob("store/evaluate/*/DONE")))
    wall, cpu = time.perf_counter(), cpu_of_children()
    train("-m", *GRID, f"sweep.search={kind}", "sweep.name=found", f"output_dir={folder}")
    wall, cpu = time.perf_counter() - wall, cpu_of_children() - cpu
    sweep = json.loads((folder / "sweeps/found/sweep.json").read_text())
    # A prolonged run has the steps of its shorter parts in its own metrics.
    runs = {point["stages"]["align"] for point in sweep["points"]}
    steps = sum(len((folder / f"store/align/{run}/metrics.jsonl").read_text().splitlines()) for run in runs)
    points = pd.read_csv(folder / "sweeps/found/points.csv").set_index("identity", drop=False)
    chosen = yaml.safe_load((folder / "sweeps/found/best.yaml").read_text())["mini_tldr"]
    best = {method: points.loc[entry["identities"][0]].to_dict() for method, entry in chosen.items()}
    return Found(best, points, steps, len(list(folder.glob("store/evaluate/*/DONE"))) - evaluated, wall, cpu)


def cpu_of_children() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def winner(row: dict[str, Any]) -> str:
    chosen = f"beta {row['beta']:g} lr {row['lr']:g}"
    return f"{chosen:22} {row['quality_selection']:.3f} {row['quality_reporting']:.3f}"


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        shared = Path(place) / "shared"
        train("method=dpo", "trainer.align.max_steps=1", f"output_dir={shared}")  # whatever it trains is no point's
        grid, halving = (search(Path(place) / kind, shared, kind) for kind in ("grid", "successive_halving"))
    print(f"{'':8} {'full grid: choosing, reporting half':36}  {'halving: the same':36}  rank in the grid")
    for method, row in grid.best.items():
        own, other = grid.points[grid.points.method == method], halving.best[method]
        rank = 1 + int((own.quality_selection > own.quality_selection[other["identity"]]).sum())
        print(f"{method:8} {winner(row):36}  {winner(other):36}  {rank} of {len(own)}")
    print(f"{'':24} {'grid':>9} {'halving':>9}  share")
    for name in ("steps", "sampled", "seconds", "cpu"):
        full, part = getattr(grid, name), getattr(halving, name)
        print(f"{name:24} {full:9.0f} {part:9.0f} {100 * part / full:5.0f} %")
    return 0


if __name__ == "__main__":
    sys.exit(main())
