"""Sampling in jobs of their own, as far as it can be tested without a cluster: arrays, options, records, statuses."""

import pytest

from launchers.slurm import submit
from launchers.slurm.cluster import QueuedJob
from launchers.slurm.graph import job_arrays
from launchers.slurm.job_records import all_submissions
from launchers.slurm.launcher import SlurmLauncher
from launchers.slurm.time_limit import signal_delay
from src.errors import ConfigError
from src.planning.plan import make_plan
from src.planning.save_time import SaveTimes
from src.planning.stage import stages_of
from src.store.store import Store
from tests.support.configs import TINY, point
from tests.support.recorded_sbatch import dependency_of, plan_of, record_sbatch, status_reader, submit_plan
from tests.support.slurm_options import slurm_options

OWN = {"sampling": "own_job"}
POINT_KINDS = ("align", "sample")


def arrays_of(plan, in_flight=(), skipped=(), max_array_size=1000, own_sampling=True):
    arrays = job_arrays(plan, in_flight, skipped, max_array_size, own_sampling=own_sampling)
    return [array for array in arrays if array.kind in POINT_KINDS]


def labels(array):
    return [task.label for (task,) in array.jobs]


def roles(plan, identities):
    return [plan.stages[identity].role for identity in identities]


def test_two_arrays_of_the_same_points_align_and_sample_them(tmp_path):
    plan = plan_of(tmp_path, num_betas=5)
    align, sample = arrays_of(plan)
    assert (align.kind, sample.kind) == POINT_KINDS and sample.follows is align and align.follows is None
    assert labels(align) == labels(sample) == [p.label for p in plan.points]
    assert {tuple(s.role for s in task.targets) for (task,) in align.jobs} == {("align",)}
    assert {tuple(s.role for s in task.targets) for (task,) in sample.jobs} == {("generate", "evaluate")}
    assert roles(plan, align.upstream) == ["sft", "reference"], "alignment waits for no samples"
    assert "baseline" in roles(plan, sample.upstream) and "align" not in roles(plan, sample.upstream)
    (same,) = arrays_of(plan, own_sampling=False)  # the control
    assert [s.role for s in same.jobs[0][0].targets] == ["align", "generate", "evaluate"] and same.follows is None


def test_points_of_other_methods_are_followed_in_arrays_of_their_own(tmp_path):
    arrays = arrays_of(plan_of(tmp_path, methods=("dpo", "orpo"), num_betas=3))
    assert [array.kind for array in arrays] == ["align", "sample"] * 2
    assert all(sample.follows is align for align, sample in (arrays[:2], arrays[2:]))
    assert arrays[0].upstream != arrays[2].upstream


def test_arrays_that_are_divided_follow_part_by_part(tmp_path):
    arrays = arrays_of(plan_of(tmp_path, num_betas=5), max_array_size=2)
    assert [(array.kind, len(array.jobs)) for array in arrays] == [
        *[("align", 2), ("sample", 2)] * 2,
        *[("align", 1), ("sample", 1)],
    ]
    for align, sample in zip(arrays[::2], arrays[1::2], strict=True):
        assert sample.follows is align and labels(sample) == labels(align)


def test_an_array_that_follows_another_has_no_more_tasks_than_slurm_tests_one_by_one(tmp_path):
    arrays = arrays_of(plan_of(tmp_path, num_betas=12))
    assert [(array.kind, len(array.jobs)) for array in arrays] == [
        *[("align", 10), ("sample", 10)],
        *[("align", 2), ("sample", 2)],
    ]
    (same,) = arrays_of(plan_of(tmp_path, num_betas=12), own_sampling=False)  # the control
    assert len(same.jobs) == 12


def test_what_is_aligned_or_in_flight_is_only_sampled(tmp_path):
    plan = plan_of(tmp_path, num_betas=3)
    done, running, new = (stages["align"] for stages in plan.stages_by_role)
    plan.needed -= {done}
    plan.done |= {done}
    *alone, align, sample = arrays_of(plan, in_flight={running})
    assert labels(align) == labels(sample) == [plan.points[2].label] and sample.follows is align
    assert [stage.identity for stage in align.jobs[0][0].targets] == [new]
    assert {(labels(a)[0], a.kind, a.follows, running in a.upstream) for a in alone} == {
        (plan.points[0].label, "sample", None, False),
        (plan.points[1].label, "sample", None, True),
    }


def test_an_alignment_that_two_points_share_is_a_job_of_its_own_for_which_both_wait(tmp_path):
    points = [point(*TINY, "method=dpo", "beta=1", f"evaluation.num_prompts={number}") for number in (8, 4)]
    plan = make_plan(points, Store(tmp_path))
    arrays = arrays_of(plan)
    shared = plan.stages_by_role[0]["align"]
    assert [array.kind for array in arrays] == ["align", "sample", "sample"]
    assert [[s.identity for s in task.targets] for (task,) in arrays[0].jobs] == [[shared]]
    assert all(array.follows is None and shared in array.upstream for array in arrays[1:])


def test_a_point_that_is_skipped_is_neither_aligned_nor_sampled(tmp_path):
    plan = plan_of(tmp_path, num_betas=3)
    skipped = plan.results[1]
    assert [labels(array) for array in arrays_of(plan, skipped={skipped})] == [
        [plan.points[0].label, plan.points[2].label]
    ] * 2


def test_each_sampling_job_follows_its_alignment_and_waits_for_the_baseline(monkeypatch, tmp_path):
    calls = record_sbatch(monkeypatch, tmp_path)
    submissions = submit_plan(plan_of(tmp_path, num_betas=3), tmp_path, **OWN, array_parallelism=2)
    by_kind = {s.kind: (s, call) for s, call in zip(submissions, calls, strict=True)}
    align, sample, aggregate = (by_kind[kind] for kind in (*POINT_KINDS, "aggregate"))
    number = align[0].jobs[0].partition("_")[0]
    baseline, sft = (by_kind[kind][0].jobs[0] for kind in ("baseline", "sft"))
    dependency = dependency_of(sample[1])
    assert dependency["aftercorr"] == [number] and set(dependency["afterok"]) == {baseline, sft}
    assert sample[1][0]["additional_parameters"]["kill-on-invalid-dep"] == "yes"
    assert baseline not in dependency_of(align[1])["afterok"]
    assert {*align[0].jobs, *sample[0].jobs} <= set(dependency_of(aggregate[1])["afterany"])
    assert align[1][0]["array_parallelism"] == sample[1][0]["array_parallelism"] == 2
    assert [task.stages[0][0] for task in sample[0].tasks] == ["generate"] * 3


def test_a_sampling_job_of_a_single_point_waits_for_the_job_that_aligns_it(monkeypatch, tmp_path):
    calls = record_sbatch(monkeypatch, tmp_path)
    submissions = submit_plan(plan_of(tmp_path), tmp_path, **OWN)
    align = next(s.jobs[0] for s in submissions if s.kind == "align")
    sample = next(call for s, call in zip(submissions, calls, strict=True) if s.kind == "sample")
    assert align in dependency_of(sample)["afterok"] and "aftercorr" not in dependency_of(sample)


def test_only_the_point_whose_alignment_failed_is_submitted_again(monkeypatch, tmp_path):
    calls = record_sbatch(monkeypatch, tmp_path)
    plan = plan_of(tmp_path, num_betas=3)
    submissions = submit_plan(plan, tmp_path, **OWN)
    align, sample = (next(s for s in submissions if s.kind == kind) for kind in POINT_KINDS)
    jobs = {task.job for s in all_submissions(Store(tmp_path)) for task in s.tasks}
    queue = {job: QueuedJob(job, "PENDING", "Dependency", "x") for job in jobs}
    cancelled = []
    monkeypatch.setattr(submit.cluster, "queue", lambda: queue)
    monkeypatch.setattr(submit.cluster, "cancel", lambda jobs: cancelled.extend(jobs))
    before = len(calls)
    assert not submit_plan(plan, tmp_path, **OWN) and len(calls) == before  # the control
    align.tasks[1].write_status({"state": "failed", "error": "x"})
    del queue[align.tasks[1].job]  # SLURM has not cancelled what follows it yet
    again = submit_plan(plan, tmp_path, **OWN)
    assert [(s.kind, [task.label for task in s.tasks]) for s in again[:2]] == [
        (kind, [plan.points[1].label]) for kind in POINT_KINDS
    ]
    assert sample.tasks[1].job in cancelled


def test_the_status_of_a_point_is_that_of_the_job_that_computes_it_now(monkeypatch, tmp_path):
    record_sbatch(monkeypatch, tmp_path)
    plan = plan_of(tmp_path, num_betas=4)
    submissions = submit_plan(plan, tmp_path, **OWN)
    align, sample = (next(s for s in submissions if s.kind == kind) for kind in POINT_KINDS)
    align.tasks[1].write_status({"state": "failed", "error": "diverged at step 2"})
    aligned = plan.stages[plan.stages_by_role[2]["align"]]
    shared = next(s.jobs[0] for s in submissions if s.kind == "baseline")
    monkeypatch.setattr(
        Store, "is_done", lambda self, stage: stage.identity == aligned.identity or stage.kind in ("sft", "reference")
    )
    queue = {align.tasks[0].job: "RUNNING", sample.tasks[0].job: "PENDING", sample.tasks[2].job: "PENDING"}
    queue |= {align.tasks[3].job: "PENDING", sample.tasks[3].job: "PENDING", shared: "RUNNING"}
    running, failed, waiting, queued = status_reader(submissions, plan, queue).points()
    assert (running.state, running.job, running.detail) == ("running", align.tasks[0].job, "align")
    assert (failed.state, failed.detail, failed.log) == ("failed", "diverged at step 2", align.tasks[1].log)
    assert (waiting.state, waiting.job, waiting.detail) == ("queued", sample.tasks[2].job, "after baseline")
    assert (queued.state, queued.job, queued.detail) == ("queued", align.tasks[3].job, "Dependency")


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"sampling": "own"}, "sampling=own: must be one of same_job, own_job, auto"),
        ({**OWN, "points_per_job": 8}, "sampling=own_job: is for jobs of one point, and points_per_job=8; set"),
        ({"kinds": {"sample": {"gpus_per_node": "x"}}}, "kinds.sample.gpus_per_node=x: must be a number"),
        ({"kinds": {"sample": {"timeout_min": 1}}}, "timeout_min=1 is too short for sample jobs"),
    ],
)
def test_sampling_that_cannot_be_is_refused(values, message):
    with pytest.raises(ConfigError, match=message) as refused:
        slurm_options(**values)
    assert "\n" not in str(refused.value)


@pytest.mark.parametrize(
    ("values", "nodes", "gpus"),
    [
        ({}, 1, 1),
        ({"gpus_per_node": 8, "nodes": 2}, 1, 1),
        ({"gpus_per_node": "h100:8"}, 1, "h100:1"),
        ({"gpus_per_node": 1, "kinds": {"align": {"gpus_per_node": "a100:4"}}}, 1, "a100:1"),
        ({"gpus_per_node": 0}, 1, 0),
        ({"gpus_per_node": 8, "kinds": {"sample": {"gpus_per_node": 2}}}, 1, 2),
    ],
)
def test_a_sampling_job_has_one_gpu_of_the_type_that_aligns_unless_it_is_given_others(values, nodes, gpus):
    sample = slurm_options(**values).kinds["sample"]
    assert (sample.nodes, sample.gpus_per_node) == (nodes, gpus)


def test_a_sampling_job_runs_where_alignments_run_and_with_their_software():
    aligns = {"partition": "h100", "setup": ["module load cuda"], "mem_gb": 900, "timeout_min": 600}
    kinds = slurm_options(partition="cpu", mem_gb=64, kinds={"align": aligns}).kinds
    sample = kinds["sample"]
    assert (sample.partition, sample.setup, sample.timeout_min) == ("h100", ["module load cuda"], 600)
    assert sample.mem_gb == 64, "not the memory of all processes that align"
    own = slurm_options(kinds={"align": aligns, "sample": {"partition": "small"}}).kinds["sample"]
    assert own.partition == "small"


def test_the_launcher_of_whole_machines_asks_for_one_gpu_and_not_all_memory_to_sample():
    sample = slurm_options("slurm_8gpu").kinds["sample"].sbatch()
    assert sample["gpus-per-node"] == 1 and "mem" not in sample
    assert slurm_options("slurm_8gpu").kinds["align"].sbatch()["mem"] == "0"  # the control


def launcher_of(monkeypatch, **options):
    monkeypatch.setattr("launchers.slurm.cluster.check_request", lambda kind, options: None)
    monkeypatch.setattr("launchers.slurm.launcher.complete_options", lambda values: slurm_options(**values))
    return SlurmLauncher(**options)


def test_one_process_samples_what_several_align(monkeypatch, tmp_path):
    plan = plan_of(tmp_path, "engine=ddp", num_betas=3)
    launcher = launcher_of(monkeypatch, **OWN, gpus_per_node=2, array_parallelism=2)
    launcher.check(plan)
    stages = {stage.role: stage for stage in plan.stages.values()}
    assert [launcher.num_processes(stages[role]) for role in ("align", "generate", "baseline")] == [2, 1, 2]
    assert launcher.starts_job(stages["generate"]) and launcher.max_running(plan) == 3
    same = launcher_of(monkeypatch, sampling="same_job", gpus_per_node=2, array_parallelism=2)  # the control
    assert same.num_processes(stages["generate"]) == 2 and not same.starts_job(stages["generate"])
    assert same.max_running(plan) == 2


def test_a_request_for_sampling_jobs_that_slurm_rejects_is_refused(monkeypatch, tmp_path):
    asked = []
    launcher = launcher_of(monkeypatch, **OWN)
    monkeypatch.setattr("launchers.slurm.cluster.check_request", lambda kind, options: asked.append(kind))
    launcher.check(plan_of(tmp_path))
    assert asked == ["aggregate", "align", "baseline", "reference", "sample", "sft"]


def test_a_sampling_job_saves_no_training_state_so_its_signal_is_not_early(tmp_path):
    options, times = slurm_options(), SaveTimes(Store(tmp_path))
    stages = {stage.kind: stage for stage in stages_of(point("setup=llama31_8b_uf", "beta=0.1"))}
    assert signal_delay("sample", [stages["generate"], stages["evaluate"]], options, times) == options.signal_delay_s
    assert signal_delay("align", [stages["align"]], options, times) > options.signal_delay_s, "the control"


@pytest.mark.parametrize(("limit", "is_refused"), [(1, True), (2, False), (None, False)])
def test_fewer_points_at_once_than_arrays_are_refused(limit, is_refused, monkeypatch, tmp_path):
    launcher = launcher_of(monkeypatch, **OWN, array_parallelism=limit)
    plan = plan_of(tmp_path, num_betas=12)
    if not is_refused:
        launcher.check(plan)
        return
    with pytest.raises(ConfigError, match="array_parallelism=1: below the 2 arrays of at most 10 points"):
        launcher.check(plan)
