"""Submits the jobs of a plan through submitit: whatever is neither done nor queued or running already."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launchers.slurm import cluster
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.graph import job_arrays, split_parallelism
from launchers.slurm.job import run_aggregation, run_task
from launchers.slurm.job_records import Submission, all_submissions, new_submission
from launchers.slurm.options import SlurmOptions
from launchers.slurm.time_limit import after_timeouts, signal_delay
from src.errors import ConfigError
from src.planning.plan import Plan
from src.planning.save_time import SaveTimes
from src.store.code_snapshot import snapshot
from src.store.sweep_folder import SweepFolder, result_folders


@dataclass
class Submitted:
    """The outcome of one call of `submit`."""

    submissions: list[Submission] = field(default_factory=list)  # new ones, the aggregation last
    in_flight: int = 0  # points that queued or running jobs compute already


def submit(plan: Plan, folder: SweepFolder, finalize: str, options: SlurmOptions, skipped: set[str]) -> Submitted:
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
    code = str(snapshot(folder.code, result_folders(store.output_dir)))
    jobs, times = dict(in_flight), SaveTimes(store)  # stage -> the job that computes it
    for array in arrays:
        tasks = [(task.label, [[stage.kind, stage.identity] for stage in task.targets]) for task in array.tasks]
        waits_for = list(dict.fromkeys(jobs[identity] for identity in array.upstream if identity in jobs))
        submission = new_submission(folder, array.kind, tasks, waits_for=waits_for, code=code)
        targets = {stage.identity: stage for task in array.tasks for stage in task.targets}
        delay = signal_delay(array.kind, targets.values(), options, times)
        timeout_min = options.kinds[array.kind].timeout_min
        submission.signal_delay_s = after_timeouts(delay, targets, known, queue, timeout_min)
        arguments = [(task.stages, submission.folder, i, options.upload) for i, task in enumerate(array.tasks)]
        _sbatch(submission, options, run_task, arguments, array.parallelism)
        outcome.submissions.append(submission)
        for array_task, job in zip(array.tasks, submission.jobs, strict=True):
            jobs |= {stage.identity: job for stage in array_task.targets}

    sweep_submissions = [s for s in known if s.sweep.path == folder.path]
    stages = {identity for stage_ids in plan.point_stages for identity in stage_ids}
    waits_for = sorted({jobs[identity] for identity in stages if identity in jobs})
    queued = [s for s in sweep_submissions if s.kind == "aggregate" and any(job in queue for job in s.jobs)]
    valid = [s for s in queued if waits_for and s.results == plan.results and set(waits_for) <= set(s.waits_for)]
    if waits_for and not valid:
        fields = {"results": plan.results, "waits_for": waits_for, "finalize": finalize, "code": code}
        aggregation = new_submission(
            folder, "aggregate", [("aggregation", [])], signal_delay_s=options.signal_delay_s, **fields
        )
        _sbatch(aggregation, options, run_aggregation, [(aggregation.folder,)])
        outcome.submissions.append(aggregation)
    cluster.cancel(job for s in queued if s not in valid for job in s.jobs)  # replaced by the new aggregation
    return outcome


def _in_flight(plan: Plan, known: list[Submission], queue: dict[str, QueuedJob]) -> dict[str, str]:
    """Return the queued or running job of every stage that has one, and cancel jobs whose upstream has failed."""
    live: dict[str, str] = {}
    for submission in known:
        for task in submission.tasks:
            job = queue.get(task.job or "")
            # A job that has failed can stay COMPLETING for long.
            if job is not None and not (job.state == "COMPLETING" and task.status().get("state") == "failed"):
                live |= {identity: job.id for _, identity in task.stages}
    # SLURM cancels the dependents of a failed job when it next evaluates dependencies, which may be later than now.
    cancelled: set[str] = set()
    for identity, stage in plan.stages.items():  # upstream first
        is_doomed = any(up.identity not in plan.done and up.identity not in live for up in stage.upstream.values())
        if is_doomed and identity in live and queue[live[identity]].reason.startswith("Dependency"):
            cancelled.add(live.pop(identity))
    cluster.cancel(cancelled)
    return live


def cancel_unrecorded(known: list[Submission], queue: dict[str, QueuedJob]) -> None:
    """Cancel jobs left behind by a submitter that died before recording their ids; they have no pickle to run."""
    for submission in known:
        if submission.state == "preparing":
            cluster.cancel({job.id for job in queue.values() if job.name.endswith(f"-{submission.folder.name}")})
            submission.state = "abandoned"
            submission.write()


def _sbatch(
    submission: Submission,
    options: SlurmOptions,
    function: Callable[..., None],
    arguments: Sequence[tuple[Any, ...]],
    parallelism: int | None = None,
) -> None:
    """Submit one task for each tuple of arguments and record the ids. Raises ConfigError when sbatch fails."""
    submission.write()
    resources = options.kinds[submission.kind]
    flags = resources.sbatch()
    native = {"nodes": flags.pop("nodes"), "ntasks_per_node": flags.pop("ntasks-per-node"), "time": flags.pop("time")}
    if submission.waits_for:
        condition = "afterany" if submission.kind == "aggregate" else "afterok"
        # A job whose dependency failed is cancelled.
        flags |= {"dependency": ":".join([condition, *submission.waits_for]), "kill-on-invalid-dep": "yes"}
    executor = submitit.SlurmExecutor(submission.folder)
    executor.update_parameters(
        **native,
        job_name=f"{submission.sweep.name}-{submission.kind}-{submission.folder.name}",
        signal_delay_s=submission.signal_delay_s,
        array_parallelism=parallelism or len(submission.tasks),
        wckey=None,  # a site may reject submitit's default
        # Since 22.05 srun does not inherit cpus-per-task from sbatch.
        srun_args=["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={resources.cpus_per_task}"],
        additional_parameters={"requeue": True, **flags},
        setup=[
            *resources.shell(),
            # Imports come from the copied code only, while the working directory stays the user's: relative paths in
            # overrides keep their meaning.
            f"export PYTHONPATH={shlex.quote(submission.code)}${{PYTHONPATH:+:$PYTHONPATH}} PYTHONSAFEPATH=1",
        ],
        teardown=[
            "code=$?",
            f"[ $code -eq 0 ] || {shlex.quote(sys.executable)} -m launchers.slurm.requeue "
            f'{shlex.quote(str(submission.folder))} "${{SLURM_ARRAY_TASK_ID:-0}}" $code',
            "exit $code",
        ],
    )
    try:
        with cluster.clean_environment(flags):
            jobs = executor.map_array(function, *zip(*arguments, strict=True))
    except (FailedSubmissionError, FailedJobError) as error:
        # SLURM may have accepted the job although sbatch failed: without a recorded id it must not run.
        cancel_unrecorded([submission], cluster.queue())
        shutil.rmtree(submission.folder, ignore_errors=True)
        message = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"hydra/launcher=slurm: sbatch rejected the {submission.kind} job ({message})") from error
    for task, job in zip(submission.tasks, jobs, strict=True):
        task.job = job.job_id
    submission.state = "submitted"
    submission.write()
