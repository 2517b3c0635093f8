"""Submits the jobs of a plan through submitit: whatever is neither done nor queued or running already."""

from __future__ import annotations

import shlex
import shutil
import sys
from collections import defaultdict
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, field
from typing import Any

import submitit
from submitit.core.utils import FailedJobError, FailedSubmissionError

from launchers.slurm import cluster
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.graph import JobArray, job_arrays, split_parallelism
from launchers.slurm.job import run_aggregation, run_task
from launchers.slurm.job_records import Submission, all_submissions, new_submission
from launchers.slurm.options import OWN_JOB, PoolResources, SlurmOptions
from launchers.slurm.point_pool import run_points
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
    in_flight: int = 0  # points that are not done and that queued or running jobs compute already


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
    outcome = Submitted(in_flight=sum(result in in_flight and result not in plan.done for result in plan.results))

    max_array_size, own_sampling = cluster.max_array_size(), options.sampling == OWN_JOB
    arrays = list(job_arrays(plan, in_flight, skipped, max_array_size, options.points_per_job, own_sampling))
    _limit(arrays, options)
    code = str(snapshot(folder.code, result_folders(store.output_dir)))
    jobs, times = dict(in_flight), SaveTimes(store)  # stage -> the job that computes it
    submitted: dict[int, Submission] = {}  # by id() of the array
    for array in arrays:
        is_pool = isinstance(options.kinds[array.kind], PoolResources)
        tasks = [
            (task.label, [[stage.kind, stage.identity] for stage in task.targets], element if is_pool else None)
            for element, job_tasks in enumerate(array.jobs)
            for task in job_tasks
        ]
        waits_for = list(dict.fromkeys(jobs[identity] for identity in array.upstream if identity in jobs))
        submission = new_submission(folder, array.kind, tasks, waits_for=waits_for, code=code)
        targets = {stage.identity: stage for job in array.jobs for task in job for stage in task.targets}
        delay = signal_delay(array.kind, targets.values(), options, times)
        timeout_min = options.kinds[array.kind].timeout_min
        submission.signal_delay_s = after_timeouts(delay, targets, known, queue, timeout_min)
        pool_jobs = {task.job for s in (*known, *outcome.submissions) for task in s.tasks if task.shares_job}
        conditions = _conditions(waits_for, may_fail=pool_jobs)
        if array.follows is not None:
            _follow(submitted[id(array.follows)], conditions)
        _sbatch(submission, options, *_calls(array, submission, options), conditions, array.parallelism)
        submitted[id(array)] = submission
        outcome.submissions.append(submission)
        jobs |= {identity: task.job for task in submission.tasks for _, identity in task.stages if task.job}

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
        _sbatch(aggregation, options, run_aggregation, [(aggregation.folder,)], {"afterany": waits_for})
        outcome.submissions.append(aggregation)
    cluster.cancel(job for s in queued if s not in valid for job in s.jobs)  # replaced by the new aggregation
    return outcome


def _limit(arrays: list[JobArray], options: SlurmOptions) -> None:
    """Let array_parallelism points run at once, over all arrays: with jobs of their own for sampling, of each kind."""
    limit = options.array_parallelism
    num_jobs = None if limit is None else limit // options.kinds["align"].points_at_once
    for kind in ("align", "sample"):
        of_kind = [array for array in arrays if array.kind == kind]
        counts = split_parallelism(num_jobs, [len(array.jobs) for array in of_kind])
        for array, count in zip(of_kind, counts, strict=True):
            array.parallelism = count


def _conditions(waits_for: list[str], may_fail: Collection[str | None]) -> dict[str, list[str]]:
    """Return the conditions of SLURM under which a job starts: condition -> jobs.

    may_fail: jobs that a failure of what is no upstream of this one makes fail. A task computes what is missing itself.
    """
    conditions: dict[str, list[str]] = defaultdict(list)
    for job in waits_for:
        conditions["afterany" if job in may_fail else "afterok"].append(job)
    return conditions


def _follow(submission: Submission, conditions: dict[str, list[str]]) -> None:
    """Add that each task waits for the one with its number in a submission."""
    number, is_array, _ = submission.jobs[0].partition("_")
    conditions["aftercorr" if is_array else "afterok"].append(number)  # a single job is no array


def _calls(
    array: JobArray, submission: Submission, options: SlurmOptions
) -> tuple[Callable[..., None], list[tuple[Any, ...]]]:
    """Return the function that the jobs of an array run, and the arguments of each."""
    folder, resources = submission.folder, options.kinds[array.kind]
    if isinstance(resources, PoolResources):
        pool = resources.num_workers, resources.gpus_per_point
        results = ([task.targets[-1] for task in job] for job in array.jobs)
        return run_points, [(points, folder, n, options.upload, *pool) for n, points in enumerate(results)]
    return run_task, [(task.stages, folder, n, options.upload) for n, (task,) in enumerate(array.jobs)]


def _in_flight(plan: Plan, known: list[Submission], queue: dict[str, QueuedJob]) -> dict[str, str]:
    """Return the queued or running job of every stage that has one, and cancel jobs whose upstream has failed."""
    live: dict[str, str] = {}
    for submission in known:
        for task in submission.tasks:
            job = queue.get(task.job or "")
            # A job that has failed can stay COMPLETING for long; one with several points goes on with the others.
            has_ended = job is not None and (task.shares_job or job.state == "COMPLETING")
            if job is not None and not (has_ended and task.status().get("state") == "failed"):
                live |= {identity: job.id for _, identity in task.stages}
    # SLURM cancels the dependents of a failed job when it next evaluates dependencies, which may be later than now.
    cancelled: set[str] = set()
    for identity, stage in plan.stages.items():  # upstream first
        is_doomed = any(up.identity not in plan.done and up.identity not in live for up in stage.upstream.values())
        if is_doomed and identity in live and queue[live[identity]].reason.startswith("Dependency"):
            cancelled.add(live.pop(identity))
    cluster.cancel(cancelled)
    return {identity: job for identity, job in live.items() if job not in cancelled}


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
    conditions: dict[str, list[str]],
    parallelism: int | None = None,
) -> None:
    """Submit one job for each tuple of arguments and record the ids. Raises ConfigError when sbatch fails.

    conditions: under which it starts, as sbatch's --dependency names them -> jobs.
    """
    submission.write()
    resources = options.kinds[submission.kind]
    flags = resources.sbatch()
    native = {"nodes": flags.pop("nodes"), "ntasks_per_node": flags.pop("ntasks-per-node"), "time": flags.pop("time")}
    if conditions:
        dependency = ",".join(":".join([condition, *jobs]) for condition, jobs in conditions.items())
        # A job whose dependency failed is cancelled.
        flags |= {"dependency": dependency, "kill-on-invalid-dep": "yes"}
    executor = submitit.SlurmExecutor(submission.folder)
    executor.update_parameters(
        **native,
        job_name=f"{submission.sweep.name}-{submission.kind}-{submission.folder.name}",
        signal_delay_s=submission.signal_delay_s,
        array_parallelism=parallelism or len(arguments),
        wckey=None,  # a site may reject submitit's default
        # Since 22.05 srun does not inherit cpus-per-task from sbatch.
        srun_args=["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={resources.cpus_per_slurm_task}"],
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
            submitted = executor.map_array(function, *zip(*arguments, strict=True))
    except (FailedSubmissionError, FailedJobError) as error:
        # SLURM may have accepted the job although sbatch failed: without a recorded id it must not run.
        cancel_unrecorded([submission], cluster.queue())
        shutil.rmtree(submission.folder, ignore_errors=True)
        message = " ".join(str(error.__cause__ or error).split())
        raise ConfigError(f"hydra/launcher=slurm: sbatch rejected the {submission.kind} job ({message})") from error
    for element, accepted in enumerate(submitted):
        for task in submission.tasks_of(element):
            task.job = accepted.job_id
    submission.state = "submitted"
    submission.write()
