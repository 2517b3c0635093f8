"""Plans of tiny points, and their submission without SLURM: what sbatch would have been asked for is recorded."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from launchers.slurm import submit
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.job_records import Submission
from launchers.slurm.point_status import StatusReader
from src.planning.plan import Plan, make_plan
from src.store.store import Store
from src.store.sweep_folder import SweepFolder
from tests.support.configs import TINY, point
from tests.support.slurm_options import slurm_options

Call = tuple[dict[str, Any], Any, list[tuple[Any, ...]]]  # parameters, function, and the arguments of each job


def plan_of(output_dir: Path, *overrides: str, methods: Sequence[str] = ("dpo",), num_betas: int = 1) -> Plan:
    """Return the plan of points of these methods with beta = 1, 2, 3 ..."""
    first = [point(*TINY, f"method={method}", "beta=1", *overrides) for method in methods]
    points = [replace(p, beta=i + 1.0) for p in first for i in range(num_betas)]
    return make_plan(points, Store(output_dir))


def record_sbatch(monkeypatch: pytest.MonkeyPatch, code: Path) -> list[Call]:
    """Return the list of what submitit is asked for from now on; jobs are 1 (no array), 2_0, 2_1 (an array), ..."""
    calls: list[Call] = []

    class Executor:
        def __init__(self, folder: Path) -> None:
            pass

        def update_parameters(self, **parameters: Any) -> None:
            self.parameters = parameters

        def map_array(self, function: Any, *arguments: Iterable[Any]) -> list[SimpleNamespace]:
            jobs = list(zip(*arguments, strict=True))
            calls.append((self.parameters, function, jobs))
            number = len(calls)
            ids = [str(number)] if len(jobs) == 1 else [f"{number}_{i}" for i in range(len(jobs))]  # as submitit does
            return [SimpleNamespace(job_id=job) for job in ids]

    monkeypatch.setattr(submit.submitit, "SlurmExecutor", Executor)
    monkeypatch.setattr(submit.cluster, "max_array_size", lambda: 1000)
    monkeypatch.setattr(submit.cluster, "queue", dict)
    monkeypatch.setattr(submit.cluster, "cancel", lambda jobs: None)
    monkeypatch.setattr(submit, "snapshot", lambda *_: code)
    return calls


def submit_plan(plan: Plan, output_dir: Path, skipped: Iterable[str] = (), **options: Any) -> list[Submission]:
    """Submit a plan as the sweep `s`; return the new submissions."""
    folder = SweepFolder(output_dir / "sweeps" / "s")
    return submit.submit(plan, folder, "m:f", slurm_options(**options), set(skipped)).submissions


def dependency_of(call: Call) -> dict[str, list[str]]:
    """Return condition -> jobs of the --dependency of a call."""
    text = call[0]["additional_parameters"].get("dependency", "")
    conditions = (part.partition(":") for part in text.split(",") if part)
    return {condition: jobs.split(":") for condition, _, jobs in conditions}


def status_reader(submissions: Sequence[Submission], plan: Plan, queue: dict[str, str]) -> StatusReader:
    """Return the reader of the statuses of a plan's points. queue: job -> its state."""
    points = [
        {"label": p.label, "setup": p.setup.name, "stages": stages, "identity": stages["evaluate"]}
        for p, stages in zip(plan.points, plan.stages_by_role, strict=True)
    ]
    reasons = {"PENDING": "Dependency"}
    jobs = {job: QueuedJob(job, state, reasons.get(state, "None"), "x") for job, state in queue.items()}
    return StatusReader(submissions[0].sweep.store, points, list(submissions), jobs, None)
