"""Keeps a sweep from taking the folder of another one of the same name that still runs."""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Set
from contextlib import ExitStack

from launchers.slurm.job_records import submissions
from launchers.slurm.status import read_status
from src.errors import ConfigError
from src.planning.content import digest
from src.store.lease import Lease, live_holder
from src.store.sweep_folder import SweepFolder


class RunningSweep:
    """Registers this process with a sweep's folder, from `claim` to the end of the `with` block.

    The same sweep may run several times at once: the processes share its stages and write the same record.
    """

    def __init__(self, folder: SweepFolder) -> None:
        self.folder = folder
        self._registry = folder.path / ".running"  # of live processes: DIGEST-TOKEN, the digest of their points
        self._registered = ExitStack()
        self._is_registered = False

    def __enter__(self) -> RunningSweep:
        return self

    def __exit__(self, *exc: object) -> None:
        self._registered.close()

    def claim(self, results: Set[str]) -> None:
        """Register; a second call does nothing.

        results: identities of the results of all points. Raises ConfigError, naming who runs it, while a process or a
        SLURM job computes a sweep of this name that has other points.
        """
        if self._is_registered:
            return
        points = digest(sorted(results))[:16]
        with Lease(self._registry / "lock"):
            for entry in self._registry.glob("*-*"):
                holder = live_holder(entry)
                if holder is None:
                    shutil.rmtree(entry, ignore_errors=True)
                elif not entry.name.startswith(points):
                    raise ConfigError(
                        f"sweep.name={self.folder.name}: {holder} runs a sweep of this name with other points; wait "
                        "until it ends, or choose another sweep.name"
                    )
            self._check_jobs(results)
            entry = self._registry / f"{points}-{uuid.uuid4().hex[:8]}"
            self._registered.callback(shutil.rmtree, entry, ignore_errors=True)
            self._registered.enter_context(Lease(entry))
        self._is_registered = True

    def _check_jobs(self, results: Set[str]) -> None:
        """Raise ConfigError while SLURM jobs compute points that are not among these results."""
        record = self.folder.read() if self.folder.exists() else None
        if record is None or record["finished"] is not None or not submissions(self.folder):
            return
        if all(point["identity"] in results for point in record["points"]):
            return
        status = read_status(self.folder, sacct_timeout=0.0)
        # An aggregation that waits for nothing else is replaced by that of the new points.
        waiting = [job for job in status.jobs if job.id in status.aggregation and job.state == "PENDING"]
        num_jobs = len(status.jobs) - len(waiting)
        if num_jobs or status.slurm_error:
            jobs = f"{num_jobs} jobs" if num_jobs else f"jobs, perhaps ({status.slurm_error}),"
            raise ConfigError(
                f"sweep.name={self.folder.name}: {jobs} of a sweep of this name with other points are queued or "
                f"running; cancel them (python -m sweeps.cancel {self.folder.path}), or choose another sweep.name"
            )
