"""One driver at a time turns a plan into jobs, through submitit: what is neither done nor already on its way."""

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
from launchers.slurm import job_records as ledger
from launchers.slurm.graph import Group, groups, shares
from launchers.slurm.job import compute, run_aggregation
from launchers.slurm.job_records import Submission, Task
from launchers.slurm.options import Resources
from src.errors import ConfigError
from src.planning.plan import Plan
from src.store.code_snapshot import snapshot
from src.store.store import Store
from src.store.sweep_folder import SweepFolder


@dataclass
class Submitted:
    """What one call of `submit` did."""

    submissions: list[Submission] = field(default_factory=list)  # new ones, the aggregation last
    on_their_way: int = 0  # points that queued or running jobs compute already
    removed: dict[str, str] = field(default_factory=dict)  # job -> label: of this sweep's folder, not in its plan


def submit(
    plan: Plan,
    folder: SweepFolder,
    finalize: str,
    resources: dict[str, Resources],
    leave: set[str],
    array_parallelism: int | None,
    signal_delay_s: int,
    wandb: str,
) -> Submitted:
    """Submit the jobs of a plan and one that calls `finalize` when all have ended. The caller holds the store's lease.

    leave: results that are not wanted, though they are not there.
    Raises ConfigError when SLURM refuses; what it took before that stays, and the same call adds the rest.
    """
    store = folder.store
    known = ledger.all_submissions(store)
    queue = cluster.queue()
    abandon(known, queue)
    plan.refresh(store)  # only now: a job that the queue has no more has published by now
    running = _on_their_way(plan, known, queue)
    outcome = Submitted(on_their_way=sum(result in running for result in plan.results))

    todo = list(groups(plan, running, leave, cluster.max_array_size()))
    code = snapshot(folder.code, output_dir=store.output_dir) if todo else None

    points = [group for group in todo if group.kind == "align"]
    for group, share in zip(points, shares(array_parallelism, [len(g.work) for g in points]), strict=True):
        group.parallel = share
    jobs = dict(running)
    for group in todo:
        assert code is not None
        executor = _Sbatch(folder, group.kind, resources[group.kind], code, signal_delay_s)
        made = executor.submit_group(group, store, [jobs[i] for i in group.needs if i in jobs], wandb)
        outcome.submissions.append(made)
        for work, task in zip(group.work, made.tasks, strict=True):
            assert task.job is not None
            jobs |= {stage.identity: task.job for stage in work.own}

    own = [s for s in known if s.sweep == folder]
    mine = {i for own_stages in plan.point_stages for i in own_stages}
    outcome.removed = ledger.strays(own, mine, queue)
    waited_for = sorted({jobs[i] for i in mine if i in jobs})
    former = [s for s in own if s.kind == "aggregate" and any(job in queue for job in s.jobs)]
    kept = [s for s in former if waited_for and s.results == plan.results and set(waited_for) <= set(s.waits_for)]
    if waited_for and not kept:
        executor = _Sbatch(folder, "aggregate", resources["aggregate"], code or _code_of(own, folder, store), 60)
        outcome.submissions.append(executor.submit_aggregation(plan.results, finalize, waited_for, wandb))
    cluster.cancel(job for s in former if s not in kept for job in s.jobs)  # others conclude for them
    return outcome


def _on_their_way(plan: Plan, known: list[Submission], queue: dict[str, cluster.Queued]) -> dict[str, str]:
    """stage -> the queued or running job that will compute it. Jobs that wait in vain are ended."""
    live: dict[str, str] = {}
    for submission in known:
        for index, task in enumerate(submission.tasks):
            job = queue.get(task.job or "")
            # SLURM may take long to clean up after a job that has failed.
            if job is not None and not (job.state == "COMPLETING" and submission.said(index).get("state") == "failed"):
                live |= {identity: job.id for _, identity in task.stages}
    vain: set[str] = set()
    while True:
        # SLURM ends the children of a failed job when it next looks at dependencies; this driver may be faster.
        lost = {
            identity
            for identity, job in live.items()
            if identity in plan.stages
            and queue[job].reason.startswith("Dependency")
            and any(
                up.identity not in plan.done and up.identity not in live
                for up in plan.stages[identity].upstream.values()
            )
        }
        if not lost:
            break
        vain |= {live.pop(identity) for identity in lost}
    cluster.cancel(vain)
    return live


def _code_of(own: list[Submission], folder: SweepFolder, store: Store) -> Path:
    return Path(own[-1].code) if own else snapshot(folder.code, output_dir=store.output_dir)


def abandon(known: list[Submission], queue: dict[str, cluster.Queued]) -> None:
    """End what a driver that died in the middle of a submission left in the queue: such a job would wait for its
    orders in vain."""
    for submission in known:
        if submission.state == "preparing":
            cluster.cancel({job.id for job in queue.values() if job.name.endswith(f"-{submission.id}")})
            submission.state = "abandoned"
            submission.write()


class _Sbatch:
    """submitit's executor for one submission."""

    def __init__(self, folder: SweepFolder, kind: str, resources: Resources, code: Path, signal_delay_s: int) -> None:
        self.folder, self.kind, self.resources, self.code = folder, kind, resources, code
        self.signal_delay_s = signal_delay_s

    def submit_group(self, group: Group, store: Store, after: list[str], wandb: str) -> Submission:
        tasks = [Task(work.label, [[s.kind, s.identity] for s in work.own]) for work in group.work]
        submission = ledger.new(self.folder, self.kind, tasks, code=str(self.code))
        count = len(tasks)
        arguments = (
            [work.stages for work in group.work],
            [str(store.output_dir)] * count,
            [str(submission.folder)] * count,
            range(count),
            [wandb] * count,
        )
        return self._sbatch(submission, compute, arguments, _dependency("afterok", after), group.parallel)

    def submit_aggregation(self, results: list[str], finalize: str, after: list[str], wandb: str) -> Submission:
        more = {"code": str(self.code), "results": results, "waits_for": after, "finalize": finalize, "upload": wandb}
        submission = ledger.new(self.folder, self.kind, [Task("aggregation", [])], **more)
        return self._sbatch(submission, run_aggregation, [[submission.folder]], _dependency("afterany", after), None)

    def _sbatch(
        self,
        submission: Submission,
        function: Callable[..., Any],
        arguments: Sequence[Sequence[Any]],
        dependency: dict[str, Any],
        parallel: int | None,
    ) -> Submission:
        resources, count = self.resources, len(submission.tasks)
        submission.write()
        executor = submitit.SlurmExecutor(submission.folder)
        options = resources.sbatch()
        native = {"nodes": options.pop("nodes"), "ntasks_per_node": options.pop("ntasks-per-node")}
        executor.update_parameters(
            **native,
            time=options.pop("time"),
            job_name=f"{self.folder.name}-{self.kind}-{submission.id}",
            signal_delay_s=self.signal_delay_s,
            array_parallelism=parallel or count,
            wckey=None,  # submitit's own would be refused where accounting knows it not
            # Since 22.05 srun does not take cpus-per-task over from sbatch.
            srun_args=["--kill-on-bad-exit=1", "--export=ALL", f"--cpus-per-task={resources.cpus_per_task}"],
            additional_parameters={"requeue": True, **dependency, **options},
            setup=[
                *resources.shell(),
                # The copied code and nothing of the folder the job starts in, which stays the user's: paths in
                # overrides mean what they meant there.
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
                jobs = executor.map_array(function, *arguments)
        except (FailedSubmissionError, FailedJobError) as error:
            # An answer that did not come is no refusal: what SLURM has taken after all must not wait for orders.
            abandon([submission], cluster.queue())
            shutil.rmtree(submission.folder, ignore_errors=True)
            said = " ".join(str(error.__cause__ or error).split())
            raise ConfigError(f"hydra/launcher=slurm: sbatch refused the {self.kind} job ({said})") from error
        for task, job in zip(submission.tasks, jobs, strict=True):
            task.job = job.job_id
        submission.state = "submitted"
        submission.write()
        return submission


def _dependency(how: str, jobs: list[str]) -> dict[str, Any]:
    if not jobs:
        return {}
    # Without the flag a child of a failed parent stays pending for ever.
    return {"dependency": ":".join([how, *dict.fromkeys(jobs)]), "kill-on-invalid-dep": "yes"}
