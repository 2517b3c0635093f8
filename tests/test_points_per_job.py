"""Several points a SLURM job, as far as it can be tested without a cluster: grouping, options, records, requeueing."""

from dataclasses import replace
from types import SimpleNamespace

import pytest

from launchers.slurm import requeue, submit
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.graph import job_arrays
from launchers.slurm.job import EXIT_REQUEUE, run_task
from launchers.slurm.job_records import read_submission
from launchers.slurm.launcher import SlurmLauncher
from launchers.slurm.options import PoolResources
from launchers.slurm.point_pool import PointStatuses, run_points
from src.errors import ConfigError
from src.planning.plan import make_plan, plan_of_results
from src.store.integrity import DONE
from src.store.store import CHECKPOINTS, StageName, Store
from src.store.sweep_folder import SweepFolder
from tests.support.configs import TINY, point
from tests.support.pool_job import write_submission
from tests.support.recorded_sbatch import plan_of, record_sbatch, status_reader, submit_plan
from tests.support.slurm_options import slurm_options


def arrays_of(plan, points_per_job, done=(), in_flight=(), max_array_size=1000):
    plan.needed -= set(done)
    return [array for array in job_arrays(plan, in_flight, (), max_array_size, points_per_job) if array.kind == "align"]


def test_sixteen_points_are_two_jobs_of_eight_each_with_every_stage_of_its_points(tmp_path):
    plan = plan_of(tmp_path, num_betas=16)
    (array,) = arrays_of(plan, 8)
    assert [len(job) for job in array.jobs] == [8, 8]
    (one_a_point,) = arrays_of(plan, 1)  # the control
    assert [len(job) for job in one_a_point.jobs] == [1] * 16 and array.upstream == one_a_point.upstream
    tasks = [task for job in array.jobs for task in job]
    assert [task.label for task in tasks] == [p.label for p in plan.points]
    assert [[s.role for s in task.targets] for task in tasks] == [["align", "generate", "evaluate"]] * 16


def test_points_that_wait_for_other_stages_are_in_jobs_of_their_own(tmp_path):
    arrays = arrays_of(plan_of(tmp_path, methods=("dpo", "orpo"), num_betas=3), 8)
    assert [[len(job) for job in array.jobs] for array in arrays] == [[3], [3]]
    assert arrays[0].upstream != arrays[1].upstream


def test_the_limit_of_an_array_counts_jobs(tmp_path):
    arrays = arrays_of(plan_of(tmp_path, num_betas=10), 2, max_array_size=3)
    assert [[len(job) for job in array.jobs] for array in arrays] == [[2, 2, 2], [2, 2]]


def test_points_that_share_an_alignment_are_in_one_job_and_it_is_no_job_of_its_own(tmp_path):
    first = [point(*TINY, "method=dpo", "beta=1", f"evaluation.num_prompts={number}") for number in (8, 4)]
    plan = make_plan([replace(p, beta=beta) for p in first for beta in (0.1, 1.0, 3.0)], Store(tmp_path))
    assert len({stages["align"] for stages in plan.stages_by_role}) == 3
    (array,) = arrays_of(plan, 3)
    jobs = [[task.targets[0].identity for task in job] for job in array.jobs]
    assert jobs == [[align] * 2 for align in dict.fromkeys(stages["align"] for stages in plan.stages_by_role)]
    num_shared = sum(len(array.jobs) for array in arrays_of(plan, 1) if len(array.jobs[0][0].targets) == 1)
    assert num_shared == 3, "the control: with one point a job, each shared alignment is a job"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"kinds": {"align": {"nodes": 2, "gpus_per_node": 4}}}, "a job of several points has one node"),
        ({"gpus_per_node": 8, "gpus_per_point": 3}, "gpus_per_point=3: must divide the 8 GPUs of an align job"),
        ({"gpus_per_node": 8, "points_per_job": 5}, "would leave 3 of the 8 GPUs of an align job without work"),
        ({"gpus_per_node": 8, "array_parallelism": 7}, "array_parallelism=7: below the 8 points that one job runs"),
        ({"points_per_job": 1, "gpus_per_point": 2}, "gpus_per_point=2: is for jobs of several points"),
        ({"points_per_job": 0}, "points_per_job=0: must be >= 1"),
        ({"gpus_per_point": 0}, "gpus_per_point=0: must be >= 1"),
    ],
)
def test_jobs_that_cannot_be_divided_among_points_are_refused(values, message):
    with pytest.raises(ConfigError, match=message) as refused:
        slurm_options(**{"points_per_job": 8, **values})
    assert "\n" not in str(refused.value)


def test_a_job_of_several_points_is_one_task_with_the_cores_of_all_its_workers():
    options = slurm_options(points_per_job=16, gpus_per_node="h100:8", cpus_per_task=4)
    align, sft = options.kinds["align"], options.kinds["sft"]
    assert isinstance(align, PoolResources) and not isinstance(sft, PoolResources)
    request = align.sbatch()
    assert (request["ntasks-per-node"], request["cpus-per-task"], request["gpus-per-node"]) == (1, 32, "h100:8")
    assert align.points_at_once == 8 and align.num_processes == 1
    assert sft.sbatch()["ntasks-per-node"] == 8 == sft.num_processes, "shared stages are as before"
    pairs = slurm_options(points_per_job=8, gpus_per_node=8, gpus_per_point=2).kinds["align"]
    assert pairs.points_at_once == 4 and pairs.num_processes == 2
    without_gpus = slurm_options(points_per_job=8, gpus_per_node=0, cpus_per_task=4).kinds["align"]
    assert without_gpus.points_at_once == 4 and without_gpus.sbatch()["cpus-per-task"] == 4


def test_whole_nodes_give_eight_gpus_to_points_and_one_to_shared_stages():
    kinds = slurm_options("slurm_whole_nodes").kinds
    assert kinds["align"].points_at_once == 8 and kinds["align"].sbatch()["mem"] == "0"
    assert [kinds[kind].gpus for kind in ("sft", "reference", "baseline", "aggregate")] == [1, 1, 1, 0]


def test_an_engine_of_one_process_is_refused_where_points_get_several_gpus(monkeypatch, tmp_path):
    monkeypatch.setattr("launchers.slurm.cluster.check_request", lambda kind, options: None)
    monkeypatch.setattr("launchers.slurm.launcher.complete_options", lambda values: slurm_options(**values))
    kinds = {kind: {"gpus_per_node": 1} for kind in ("sft", "reference", "baseline")}
    launcher = SlurmLauncher(points_per_job=8, gpus_per_node=8, gpus_per_point=2, kinds=kinds)
    with pytest.raises(ConfigError, match=r"gpus_per_point: align is computed by 2 processes, but engine=single uses"):
        launcher.check(plan_of(tmp_path))
    plan = plan_of(tmp_path, "engine=ddp")
    launcher.check(plan)  # the control
    processes = {stage.role: launcher.num_processes(stage) for stage in plan.stages.values()}
    shared = dict.fromkeys(("sft", "reference", "baseline"), 1)
    assert processes == {**shared, "align": 2, "generate": 2, "evaluate": 1}
    assert launcher.on_gpus(4).split() == [
        *("hydra.launcher.points_per_job=1", "hydra.launcher.gpus_per_point=1", "hydra.launcher.gpus_per_node=4")
    ]


@pytest.mark.parametrize(
    ("values", "number"),
    [
        ({}, 32),  # as many jobs as points
        ({"points_per_job": 8, "gpus_per_node": 2}, 4 * 2),
        ({"points_per_job": 8, "gpus_per_node": 2, "array_parallelism": 5}, 5),
        ({"points_per_job": 100, "gpus_per_node": 8, "gpus_per_point": 4}, 2 * 2),
        ({"points_per_job": 8, "gpus_per_node": 8}, 32),
    ],
)
def test_as_many_points_are_computed_at_once_as_all_jobs_have_workers(values, number, monkeypatch, tmp_path):
    """The disk line of a dry run counts a model for each of them."""
    monkeypatch.setattr("launchers.slurm.launcher.complete_options", lambda values: slurm_options(**values))
    plan = plan_of(tmp_path, methods=("dpo", "orpo"), num_betas=16)  # which wait for different stages
    assert SlurmLauncher(**values).max_running(plan) == number


@pytest.fixture
def sbatch(monkeypatch, tmp_path):
    return record_sbatch(monkeypatch, tmp_path)


def test_each_job_is_submitted_with_its_points_and_their_records_name_it(sbatch, tmp_path):
    plan = plan_of(tmp_path, num_betas=5)
    submissions = submit_plan(plan, tmp_path, points_per_job=2, gpus_per_node=2, array_parallelism=4)
    (parameters, _, calls), (align,) = (
        next(call for call in sbatch if call[1] is run_points),
        [s for s in submissions if s.kind == "align"],
    )
    assert [[stage.identity for stage in arguments[0]] for arguments in calls] == [
        *(plan.results[0:2], plan.results[2:4], plan.results[4:5])
    ]
    assert [arguments[2] for arguments in calls] == [0, 1, 2] and {arguments[4:] for arguments in calls} == {(2, 1)}
    assert parameters["array_parallelism"] == 2, "four points at once are two jobs"
    number = align.jobs[0].partition("_")[0]
    record = read_submission(align.folder)
    assert [task.job for task in record.tasks] == [f"{number}_{i}" for i in (0, 0, 1, 1, 2)]
    assert record.jobs == [f"{number}_{i}" for i in range(3)]
    assert [task.index for task in record.tasks_of(1)] == [2, 3]
    assert {call[1] for call in sbatch} == {run_task, run_points, submit.run_aggregation}


def test_only_a_point_that_failed_is_submitted_again_while_its_job_runs(sbatch, monkeypatch, tmp_path):
    plan = plan_of(tmp_path, num_betas=4)
    align = next(s for s in submit_plan(plan, tmp_path, points_per_job=4, gpus_per_node=2) if s.kind == "align")
    jobs = {task.job for s in submit.all_submissions(Store(tmp_path)) for task in s.tasks}
    running = {job: QueuedJob(job, "RUNNING", "None", "x") for job in jobs}
    monkeypatch.setattr(submit.cluster, "queue", lambda: running)
    before = len(sbatch)
    assert not submit_plan(plan, tmp_path, points_per_job=4, gpus_per_node=2) and len(sbatch) == before  # the control
    align.tasks[2].write_status({"state": "failed", "error": "x"})
    again = submit_plan(plan, tmp_path, points_per_job=4, gpus_per_node=2)
    assert [(s.kind, [task.label for task in s.tasks]) for s in again] == [
        *[("align", [plan.points[2].label]), ("aggregate", ["aggregation"])]
    ]


def test_a_job_that_needs_another_points_stage_runs_whatever_becomes_of_the_other_points(sbatch, monkeypatch, tmp_path):
    store, one_job = Store(tmp_path), {"points_per_job": 2, "gpus_per_node": 2}
    first, second = (point(*TINY, "method=orpo", "beta=1", f"evaluation.num_prompts={n}") for n in (8, 4))
    submit_plan(make_plan([first], store), tmp_path, **one_job)
    live = {task.job: task.job for s in submit.all_submissions(store) for task in s.tasks}
    queue = {job: QueuedJob(job, "RUNNING", "None", "x") for job in live}
    monkeypatch.setattr(submit.cluster, "queue", lambda: queue)
    sbatch.clear()
    submit_plan(make_plan([first, second], store), tmp_path, **one_job)
    dependency = next(call[0] for call in sbatch if call[1] is run_points)["additional_parameters"]["dependency"]
    conditions = dict(part.partition(":")[::2] for part in dependency.split(","))
    shared = [job for job in live if job in conditions.get("afterany", "")]
    assert len(shared) == 1, "the job that aligns, which fails when its other points do"


def reader(submission, plan, state, jobs=("1_0",)):
    return status_reader([submission], plan, dict.fromkeys(jobs, state))


def test_the_status_tells_the_points_of_one_job_apart(tmp_path):
    plan = plan_of(tmp_path, num_betas=4)
    submission = write_submission(SweepFolder(tmp_path / "sweeps" / "s"), plan)
    for task, state in zip(submission.tasks, ("failed", "running", "waiting"), strict=False):
        task.write_status({"state": state, "error": "diverged at step 2"})
    submission.tasks[0].own_log.write_text("the log of one point")
    failed, running, *queued = reader(submission, plan, "RUNNING").points()
    assert (failed.state, failed.detail, failed.log) == ("failed", "diverged at step 2", submission.tasks[0].own_log)
    assert running.state == "running" and {p.state for p in queued} == {"queued"}
    assert running.log == submission.folder / "1_0_0_log.err", "that of the job, before a point has its own"
    requeued = reader(submission, plan, "PENDING").points()
    assert [p.state for p in requeued] == ["failed", "queued", "queued", "queued"]
    ended = reader(submission, plan, "RUNNING", jobs=()).points()
    assert "diverged" in ended[0].detail and "job ended without a result" in ended[1].detail


@pytest.fixture
def job(monkeypatch, tmp_path):
    """Return the record of a running job of three points; `requeued` lists the requeues."""
    submission = write_submission(SweepFolder(tmp_path / "sweeps" / "s"), plan_of(tmp_path, num_betas=3))
    requeued = []
    monkeypatch.setattr(requeue, "JobEnvironment", lambda: SimpleNamespace(job_id="1_0"))
    monkeypatch.setattr(requeue.cluster, "queue", lambda: {"1_0": QueuedJob("1_0", "RUNNING", "None", "x")})
    monkeypatch.setattr(requeue.cluster, "requeue", requeued.append)
    epilogue = lambda code: requeue.main([str(submission.folder), "0", str(code)])  # noqa: E731
    return SimpleNamespace(submission=submission, tasks=submission.tasks, requeued=requeued, epilogue=epilogue)


def states(job):
    return [task.status().get("state") for task in job.tasks]


def test_a_stopped_job_is_requeued_for_the_points_that_are_left(job):
    for task, state in zip(job.tasks, ("done", "failed", "stopped"), strict=True):
        task.write_status({"state": state})
    job.epilogue(EXIT_REQUEUE)
    assert job.requeued == ["1_0"] and states(job) == ["done", "failed", "requeued"]
    left = PointStatuses(job.tasks).left  # what the next run of the job begins with
    assert [task.index for task in left] == [2] and states(job) == ["done", "failed", "waiting"]


def test_a_job_whose_points_have_all_ended_is_not_requeued_after_its_bad_exit(job):
    for task, state in zip(job.tasks, ("done", "failed", "done"), strict=True):
        task.write_status({"state": state})
    job.epilogue(1)
    assert not job.requeued and states(job) == ["done", "failed", "done"]


def test_a_job_that_is_killed_without_progress_fails_only_what_is_left(job):
    job.tasks[0].write_status({"state": "failed", "error": "its own"})
    for _ in range(requeue.MAX_STALLED_RUNS):  # the first counts the point that failed as progress
        job.epilogue(137)
        assert states(job) == ["failed", "requeued", "requeued"]
    job.epilogue(137)
    assert states(job) == ["failed"] * 3 and len(job.requeued) == requeue.MAX_STALLED_RUNS
    errors = [task.status()["error"] for task in job.tasks]
    assert errors[0] == "its own" and errors[1] == errors[2]
    assert "killed (exit code 137) 5 times without progress (3 of 9 stages done" in errors[1]


def test_a_job_that_could_not_start_fails_all_its_points_with_its_log(job):
    job.epilogue(1)
    assert states(job) == ["failed"] * 3 and not job.requeued
    assert {t.status()["error"] for t in job.tasks} == {f"exit code 1; log: {job.submission.folder}/1_0_0_log.err"}


def test_a_plan_of_results_is_that_of_the_points(tmp_path):
    plan = plan_of(tmp_path, methods=("dpo", "orpo"), num_betas=2)
    again = plan_of_results([plan.stages[result] for result in plan.results], Store(tmp_path))
    assert again.needed == plan.needed and again.results == plan.results
    assert again.stages_by_role == plan.stages_by_role and again.points == plan.points


def test_training_a_removed_model_again_is_progress_of_the_stage_that_needs_it(tmp_path):
    """Otherwise a job that is requeued meanwhile fails after a few runs, as one that does not get further."""
    plan = plan_of(tmp_path, num_betas=1)
    store, stages = Store(tmp_path), [[stage.kind, stage.identity] for stage in plan.stages.values()]
    kinds = [kind for kind, _ in stages]
    num_done = kinds.index("align") + 1
    for kind, identity in stages[:num_done]:
        store.dir(StageName(kind, identity)).mkdir(parents=True)
        (store.dir(StageName(kind, identity)) / DONE).touch()
    assert requeue.progress_marker(store, stages) == [num_done, 0]  # the control
    CHECKPOINTS.path(store.work(StageName(*stages[num_done - 1])) / "checkpoints" / "whole", 5).mkdir(parents=True)
    assert requeue.progress_marker(store, stages) == [num_done, 5]
