"""What the tests on a SLURM cluster have in common: what they run, and how they look at what becomes of it."""

import json
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

from tests.support.commands import ROOT, SMALL, environment
from tests.support.slurm_cluster import Cluster

MAX_ARRAY = 8
SLURM = [
    *("hydra/launcher=slurm", "hydra.launcher.cpus_per_task=1", "hydra.launcher.timeout_min=60"),
    "hydra.launcher.array_parallelism=2",
]
FOUR = ["-m", "method=dpo,orpo", "beta=0.1,1", *SMALL, "sweep.name=four"]
# Long enough to be hit in the middle.
LONG = [*SMALL, "dataset.train_size=256", "trainer.align.epochs=16", "trainer.save_steps=5"]
LATER = "hydra.launcher.additional_parameters.begin=now+1hour"  # queued, and no CPU spent


def queue(cluster: Cluster, *options: str) -> list[str]:
    return cluster.run("squeue", "-h", "-r", "-o", "%i", *options).split()


def accounted(cluster: Cluster, jobs: list[str]) -> dict[str, dict[str, str]]:
    """sacct's row of each job, waited for: it lags."""
    fields = "JobID,JobName,State,Submit,Start,End"
    rows: dict[str, dict[str, str]] = {}

    def there() -> bool:
        lines = cluster.run("sacct", "-X", "-P", "-o", fields, "-j", ",".join(jobs)).splitlines()
        rows.update({p[0]: dict(zip(fields.split(","), p, strict=True)) for p in (x.split("|") for x in lines[1:])})
        return set(jobs) <= {r.partition("_[")[0] for r in rows} and all(r["End"] != "Unknown" for r in rows.values())

    until(there)
    return rows


def until(condition: Callable[[], object], seconds: float = 120) -> None:
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.2)


def tool(name: str, folder: Path, *options: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", f"sweeps.{name}", str(folder), *options]
    return subprocess.run(command, cwd=ROOT, env=environment(), capture_output=True, text=True, check=False)


def submissions(folder: Path) -> dict[str, dict]:
    found = [json.loads(path.read_text()) for path in folder.glob("jobs/*/submission.json")]
    return {s["kind"]: s for s in sorted(found, key=lambda s: s["written"]) if s["state"] == "submitted"}


def said(folder: Path) -> list[dict]:
    return [json.loads(path.read_text()) for path in folder.glob("jobs/*/task-*.json")]


def sweep_json(folder: Path) -> dict:
    return json.loads((folder / "sweep.json").read_text())


def finished(folder: Path) -> bool:
    return sweep_json(folder)["finished"] is not None


def step_of(folder: Path) -> int:
    """Step of the newest checkpoint of an alignment that is running."""
    return max((int(p.name[5:]) for p in (folder / "store").glob("align/.work/*/checkpoints/*/step-*")), default=0)
