"""Wall time of the demo as jobs of a loopback SLURM cluster with two cores, and with the local launcher on as many.

    python -m benchmarks.points_per_job [48 ...] [--override KEY=VALUE ...]    as root, with Debian's SLURM packages

The numbers are points a job; 1 is one job a point. Each sweep runs alone in an empty store, from the command to the end
of its aggregation. Prints the seconds and their ratios to the local launcher's, and compares every artifact of the
stores, except timings: exit code 1 when one differs.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from tests.support.artifacts import results
from tests.support.commands import ROOT
from tests.support.slurm_cluster import Cluster, missing

CORES = 2
DEMO = ["-m", "+sweep=demo", "tracking=none"]
SLURM = [
    *("hydra/launcher=slurm", "hydra.launcher.wait=true", "hydra.launcher.timeout_min=60"),
    *("hydra.launcher.gpus_per_node=0", "hydra.launcher.cpus_per_task=1"),
]


def launcher_options(points_per_job: int) -> list[str]:
    """Return the overrides of a sweep as jobs: each with one core, or with all cores for several points at once."""
    several = [f"hydra.launcher.points_per_job={points_per_job}", f"hydra.launcher.kinds.align.cpus_per_task={CORES}"]
    return [*SLURM, *(several if points_per_job > 1 else [])]


def seconds(output_dir: Path, *overrides: str) -> float:
    """Return the wall time of the demo in an empty output_dir."""
    started = time.monotonic()
    command = [sys.executable, "-m", "src.train", *DEMO, *overrides, f"output_dir={output_dir}"]
    subprocess.run(command, cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    return time.monotonic() - started


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.points_per_job", description=__doc__.partition("\n")[0])
    parser.add_argument("points_per_job", type=int, nargs="*", default=[48])
    parser.add_argument("--override", nargs="*", default=[], help="KEY=VALUE, such as trainer.align.max_steps=8")
    arguments = parser.parse_args()
    if reason := missing():
        print(f"error: {reason}", file=sys.stderr)
        return 2
    exit_code = 0
    with tempfile.TemporaryDirectory(prefix="points-per-job-") as temporary:
        folder = Path(temporary)
        workers = f"hydra.launcher.workers={CORES}"
        local = seconds(folder / "local", workers, *arguments.override)
        print(f"local launcher, {CORES} workers     {local:6.0f} s", flush=True)
        cluster = Cluster(folder / "slurm", nodes=1, cpus=CORES, gpus=1)
        cluster.up()
        try:
            os.environ["SLURM_CONF"] = cluster.environment()["SLURM_CONF"]
            for number in arguments.points_per_job:
                output_dir = folder / f"jobs-{number}"
                jobs = seconds(output_dir, *launcher_options(number), *arguments.override)
                is_equal = results(output_dir) == results(folder / "local")
                exit_code |= not is_equal
                verdict = "the same numbers" if is_equal else "other numbers"
                print(f"jobs of {number:2} points           {jobs:6.0f} s  x {jobs / local:.2f}  {verdict}", flush=True)
        finally:
            cluster.down()
    return exit_code


if __name__ == "__main__":
    sys.exit(main())
