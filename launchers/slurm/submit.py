"""Submits the jobs of a plan through submitit: whatever is neither done nor queued or running already."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launchers.slurm import cluster
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.graph import JobArray, job_arrays, split_parallelism
from launchers.slurm.job import run_aggregation, run_task
from launchers.slurm.job_records import Submission, TaskRecord, all_submissions, new_submission, orphaned_jobs
from launchers.slurm.options import JobResources
from src.errors import ConfigError
from src.planning.plan import Plan
from src.store.code_snapshot import snapshot
from src.store.sweep_folder import SweepFolder

AGGREGATION_SIGNAL_DELAY_S = 60  # it saves nothing before its time limit


@dataclass(frozen=True)
class JobOptions:
    """hydra.launcher, as far as jobs depend on it."""

    resources: dict[str, JobResources]  # by kind of job
    array_parallelism: int | None
    signal_delay_s: int
    upload: str  # during, after


@dataclass
class Submitted:
    """The outcome of one call of `submit`."""

    submissions: list[Submission] = field(default_factory=list)  # new ones, the aggregation last
    in_flight: int = 0  # points that queued or running jobs compute already
    removed: dict[str, str] = field(default_factory=dict)  # job -> label: jobs of points that the sweep no longer has


def submit(plan: Plan, folder: SweepFolder, finalize: str, options: JobOptions, skipped: set[str]) -> Submitted:
    """Submit the jobs of a plan, and an aggregation that calls `finalize` when all others have ended.

    The caller must hold the submission lease. skipped: results not to be computed though they are missing. Raises
    ConfigError when SLURM rejects a job; jobs it accepted before stay, and the same call again submits the rest.
    """
    store = folder.store
    known, queue = all_submissions(store), cluster.queue()
    cancel_unrecorded(known, queue)
    plan.refresh(store)  # after the queue was read: a job that has left it has published its stages
    in_flight = _in_flight(plan, known, queue)
    outcome = Submitted(in_flight=sum(result in in_flight for result in plan.results))

    arrays = list(job_arrays(plan, in_flight, skipped, cluster.max_array_size()))
    point_arrays = [array for array in arrays if array.kind == "align"]
    parallelism = split_parallelism(options.array_parallelism, [len(array.tasks) for array in point_arrays])
    for array, count in zip(point_arrays, parallelism, strict=True):
        array.parallelism = count
    code = snapshot(folder.code, output_dir=store.output_dir) if arrays else None
    jobs = dict(in_flight)  # stage -> the job that computes it
    for array in arrays:
        assert code is not None
        executor = _Sbatch(folder, array.kind, options.resources[array.kind], code, options.signal_delay_s)
        upstream_jobs = [jobs[identity] for identity in array.upstream if identity in jobs]
        submission = executor.submit_array(array, upstream_jobs, options.upload)
        outcome.submissions.append(submission)
        for task, record in zip(array.tasks, submission.tasks, strict=True):
            assert record.job is not None
            jobs |= {stage.identity: record.job for stage in task.targets}

    sweep_submissions = [s for s in known if s.sweep == folder]
    stages = {identity for stage_ids in plan.point_stages for identity in stage_ids}
    outcome.removed = orphaned_jobs(sweep_submissions, stages, queue)
    waits_for = sorted({jobs[identity] for identity in stages if identity in jobs})
    queued = [s for s in sweep_submissions if s.kind == "aggregate" and any(job in queue for job in s.jobs)]
    valid = [s for s in queued if waits_for and s.results == plan.results and set(waits_for) <= set(s.waits_for)]
    if waits_for and not valid:
        if code is None:
            latest = sweep_submissions[-1:]
            code = Path(latest[0].code) if latest else snapshot(folder.code, output_dir=store.output_dir)
        executor = _Sbatch(folder, "aggregate", options.resources["aggregate"], code, AGGREGATION_SIGNAL_DELAY_S)
        aggregation = executor.submit_aggregation(plan.results, finalize, waits_for)
        outcome.submissions.append(aggregation)
    cluster.cancel(job for s in queued if s not in valid for job in s.jobs)  # replaced by the new aggregation
    return outcome


def _in_flight(plan: Plan, known: list[Submission], queue: dict[str, QueuedJob]) -> dict[str, str]:
    """Return the queued or running job of every stage that has one, and cancel jobs whose upstream has failed."""
    live: dict[str, str] = {}
    for submission in known:
        for index, task in enumerate(submission.tasks):
            job = queue.get(task.job or "")
            # A job that has failed can stay COMPLETING for long.
            if job is not None and not (
                job.state == "COMPLETING" and submission.status(index).get("state") == "failed"
            ):
                live |= {identity: job.id for _, identity in task.stages}
    cancelled: set[str] = set()
    while True:
        # SLURM cancels the dependents of a failed job when it next evaluates dependencies, which may be later than now.
        doomed = {
            identity
            for identity, job in live.items()
            if identity in plan.stages
            and queue[job].reason.startswith("Dependency")
            and any(
                up.identity not in plan.done and up.identity not in live
                for up in plan.stages[identity].upstream.values()
            )
        }
        if not doomed:
            break
        cancelled |= {live.pop(identity) for identity in doomed}
    cluster.cancel(cancelled)
    return live


def cancel_unrecorded(known: list[Submission], queue: dict[str, QueuedJob]) -> None:
    """Cancel jobs left behind by a submitter that died before recording their ids; they have no pickle to run."""
    for submission in known:
        if submission.state == "preparing":
            cluster.cancel({job.id for job in queue.values() if job.name.endswith(f"-{submission.id}")})
            submission.state = "abandoned"
            submission.write()


class _Sbatch:
    """submitit's executor for one submission."""

    def __init__(
        self, folder: SweepFolder, kind: str, resources: JobResources, code: Path, signal_delay_s: int
    ) -> None:
        self.folder, self.kind, self.resources, self.code = folder, kind, resources, code
        self.signal_delay_s = signal_delay_s

    def submit_array(self, array: JobArray, upstream_jobs: list[str], upload: str) -> Submission:
        records = [TaskRecord(task.label, [[s.kind, s.identity] for s in task.targets]) for task in array.tasks]
        submission = new_submission(self.folder, self.kind, records, code=str(self.code))
        arguments = [
            (task.stages, str(self.folder.output_dir), str(submission.folder), index, upload)
            for index, task in enumerate(array.tasks)
        ]
        return self._sbatch(submission, run_task, arguments, _dependency("afterok", upstream_jobs), array.parallelism)

    def submit_aggregation(self, results: list[str], finalize: str, waits_for: list[str]) -> Submission:
        fields = {"results": results, "waits_for": waits_for, "finalize": finalize}
        record = TaskRecord("aggregation", [])
        submission = new_submission(self.folder, self.kind, [record], code=str(self.code), **fields)
        return self._sbatch(submission, run_aggregation, [(submission.folder,)], _dependency("afterany", waits_for))

    def _sbatch(
        self,
        submission: Submission,
        function: Callable[..., None],
        arguments: Sequence[tuple[Any, ...]],
        dependency: dict[str, Any],
        parallelism: int | None = None,
    ) -> Submission:
        """Submit one task for each tuple of arguments and record the ids. Raises ConfigError when sbatch fails."""
        submission.write()
        executor = submitit.SlurmExecutor(submission.folder)
        options = self.resources.sbatch()
        native = {"nodes": options.pop("nodes"), "ntasks_per_node": options.pop("ntasks-per-node")}
        executor.update_parameters(
            **native,
            time=options.pop("time"),
            job_name=f"{self.folder.name}-{self.kind}-{submission.id}",
            signal_delay_s=self.signal_delay_s,
            array_parallelism=parallelism or len(submission.tasks),
            wckey=None,  # a site may reject submitit's default
            # Since 22.05 srun does not inherit cpus-per-task from sbatch.
            srun_args=["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={self.resources.cpus_per_task}"],
            additional_parameters={"requeue": True, **dependency, **options},
            setup=[
                *self.resources.shell(),
                # Imports come from the copied code only, while the working directory stays the user's: relative paths
                # in overrides keep their meaning.
                f"export PYTHONPATH={shlex.quote(str(self.code))}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
            ],
            teardown=[
                "code=$?",
                f"[ $code -eq 0 ] || {shlex.quote(sys.executable)} -m launchers.slurm.requeue "
                f'{shlex.quote(str(submission.folder))} "${{SLURM_ARRAY_TASK_ID:-0}}" $code',
                "exit $code",
            ],
        )
        try:
            with cluster.clean_environment(options):
                jobs = executor.map_array(function, *zip(*arguments, strict=True))
        except (FailedSubmissionError, FailedJobError) as error:
            # SLURM may have accepted the job although sbatch failed: without a recorded id it must not run.
            cancel_unrecorded([submission], cluster.queue())
            shutil.rmtree(submission.folder, ignore_errors=True)
            message = " ".join(str(error.__cause__ or error).split())
            raise ConfigError(f"hydra/launcher=slurm: sbatch rejected the {self.kind} job ({message})") from error
        for task, job in zip(submission.tasks, jobs, strict=True):
            task.job = job.job_id
        submission.state = "submitted"
        submission.write()
        return submission


def _dependency(condition: str, jobs: list[str]) -> dict[str, Any]:
    """Return sbatch's options for a job that waits for others; a job whose dependency failed is cancelled."""
    if not jobs:
        return {}
    return {"dependency": ":".join([condition, *dict.fromkeys(jobs)]), "kill-on-invalid-dep": "yes"}
