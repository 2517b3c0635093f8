"""What stages took of accelerators: computing, and what processes waited meanwhile."""

import threading
import time

import pytest

from src.distributed import DistributedContext
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.planning.plan import make_plan
from src.stages import runner
from src.store.files import read_checksummed_json
from src.store.lease import Lease
from src.store.store import Store
from src.store.usage import Usage, usage_by_kind, usage_of
from tests.support.configs import point


@pytest.mark.parametrize(
    ("done", "in_use", "waiting"),
    [
        ({"seconds": 10.0}, 10, 0),  # of version 0.2
        ({"seconds": 10.0, "processes": 8}, 80, 0),
        ({"seconds": 10.0, "processes": 8, "held_processes": 8, "loading_seconds": 2.0}, 64, 16),
        ({"seconds": 10.0, "processes": 8, "held_processes": 8, "alone_seconds": 3.0}, 7 * 8 + 3, 3 * 7),
        ({"seconds": 10.0, "processes": 1, "held_processes": 8}, 10, 70),
        ({"seconds": 10.0, "processes": 1, "held_processes": 8, "waited_seconds": 5.0}, 10, 110),
    ],
)
def test_every_second_of_every_process_is_either_in_use_or_waiting(done, in_use, waiting):
    assert usage_of(done) == Usage(in_use, waiting)
    held = done.get("held_processes", done.get("processes", 1))
    assert in_use + waiting == held * (done["seconds"] + done.get("waited_seconds", 0))


@pytest.fixture
def stages(tmp_path):
    """The stages of a point, by role, and their store."""
    store = Store(tmp_path)
    plan = make_plan([point(f"output_dir={tmp_path}")], store)
    return {stage.role: stage for stage in plan.stages.values()}, store


def compute(stage, store):
    runner.compute_or_wait(stage, store)
    return read_checksummed_json(store.dir(stage) / "DONE")


def load_work_and_save(stage, store, attempt):
    time.sleep(0.3)
    with attempt.loading():  # before the first step all is
        time.sleep(0.1)
    attempt.step(0, 1)
    time.sleep(0.2)
    with attempt.loading():
        time.sleep(0.1)
    with attempt.alone():
        time.sleep(0.4)


def test_a_stage_tells_how_long_it_loaded_and_how_long_the_others_waited_for_rank_0(stages, monkeypatch):
    by_role, store = stages
    monkeypatch.setattr(runner, "_run", load_work_and_save)
    done = compute(by_role["sft"], store)
    assert 0.5 <= done["loading_seconds"] <= done["seconds"] - 0.6 and done["alone_seconds"] >= 0.4
    assert done["seconds"] >= done["loading_seconds"] + 0.2 + done["alone_seconds"]
    usage = usage_of(done)
    assert usage.waiting == pytest.approx(done["loading_seconds"] + done["waited_seconds"])


def test_a_process_that_waits_for_another_one_tells_so_in_the_next_stage_that_it_computes(stages, monkeypatch):
    by_role, store = stages
    monkeypatch.setattr(runner, "_run", load_work_and_save)
    started, waited = threading.Event(), threading.Event()

    def compute_elsewhere():
        with Lease(store.work(by_role["sft"])):
            started.set()
            waited.wait(60)

    other = threading.Thread(target=compute_elsewhere)
    other.start()
    started.wait(60)
    reports = []

    def end_the_wait_after_three_looks(label, step, total):
        reports.append(label)
        if len(reports) == 3:
            waited.set()

    runner.compute_or_wait(by_role["sft"], store, end_the_wait_after_three_looks)
    other.join()
    done = read_checksummed_json(store.dir(by_role["sft"]) / "DONE")
    assert "waiting for process" in reports[2] and done["waited_seconds"] >= 1
    assert runner._waited.seconds == 0, "the wait is counted once"


@pytest.mark.parametrize(("role", "processes"), [("reference", 4), ("evaluate", 1)])
def test_processes_of_a_run_count_as_waiting_in_stages_that_rank_0_computes(role, processes, stages, monkeypatch):
    """All compute log-probs; verdicts of a judge without a model are those of rank 0."""
    by_role, store = stages
    monkeypatch.setattr(runner, "_run", lambda stage, store, attempt: attempt.step(1, 1))
    for stage in by_role[role].upstream.values():
        compute(stage, store)
    monkeypatch.setattr(runner, "_run", load_work_and_save)
    monkeypatch.setattr(DistributedContext, "broadcast_object", lambda self, message=None: message)
    monkeypatch.setattr(runner, "get_distributed", lambda: DistributedContext(size=4))
    done = compute(by_role[role], store)
    assert (done["processes"], done["held_processes"]) == (processes, 4)
    usage = usage_of(done)
    assert usage.in_use + usage.waiting == pytest.approx(4 * (done["seconds"] + done["waited_seconds"]))
    assert usage.in_use >= processes * 0.2 + 0.4, "what is computed together, and what rank 0 computes alone"


def test_the_usage_of_a_sweep_counts_each_stage_once_and_leaves_out_what_is_not_finished(stages, monkeypatch):
    by_role, store = stages
    monkeypatch.setattr(runner, "_run", load_work_and_save)
    done = compute(by_role["sft"], store)
    of_points = [(role, stage.identity) for role, stage in by_role.items()] * 2
    assert usage_by_kind(store, of_points) == {"sft": usage_of(done)}
    compute(by_role["baseline"], store)
    assert list(usage_by_kind(store, of_points)) == ["sft", "generate"]
    (store.dir(by_role["sft"]) / "DONE").write_text("damaged")
    assert list(usage_by_kind(store, of_points)) == ["generate"]
    assert sum(usage_by_kind(store, []).values(), Usage()) == Usage()


def test_estimates_count_computing_by_tokens_and_waiting_by_stages(stages, monkeypatch, tmp_path):
    by_role, store = stages

    def run(stage, store, attempt):
        load_work_and_save(stage, store, attempt)
        attempt.tokens = 1000

    monkeypatch.setattr(runner, "_run", run)
    for role in ("sft", "reference", "align"):
        usage = usage_of(compute(by_role[role], store))
    twice_as_long = [point("beta=0.2", "trainer.align.epochs=2", f"output_dir={tmp_path}")]
    plan = make_plan([*twice_as_long, point("beta=0.3", f"output_dir={tmp_path}")], store)
    cost = Cost(plan, store, Forecast(plan, lambda stage: 1, all_rehearsed=False))
    estimate = cost.estimates["align"]
    assert (estimate.num_stages, estimate.tokens, estimate.source) == (2, 3000, "measured")
    assert estimate.waiting == pytest.approx(2 * usage.waiting / 3600)
    assert estimate.hours == pytest.approx((3 * usage.in_use + 2 * usage.waiting) / 3600)
    assert "waiting: as finished stages did" in cost.text()


def test_a_file_in_the_place_of_stages_has_taken_nothing(tmp_path):
    store = Store(tmp_path)
    store.root.mkdir(parents=True)
    (store.root / "sft").write_text("no folder")
    assert usage_by_kind(store, [("sft", "a"), ("align", "b")]) == {}
