"""A stage that trains is stopped while it scores held-out rows, and goes on from there."""

import shutil

import pytest

from src import preemption
from src.planning.stage import stages_of
from src.stages.runner import compute_or_wait
from src.stages.shared_rows import SharedRows
from src.store.store import Store
from src.training.accelerate_engine import AccelerateEngine
from src.training.checkpoint_schedule import CheckpointSchedule
from src.training.one_process_engine import OneProcessEngine
from tests.support.artifacts import results
from tests.support.configs import TINY, point

SEVERAL_BATCHES = ("dataset.sft_validation_size=16", "trainer.max_tokens_per_micro_batch=320")


@pytest.fixture(scope="module", params=["sft", "align"])
def undisturbed(request, tmp_path_factory):
    """A stage, those before it, and the folder in which all of them were computed."""
    from src.model.loading import set_cpu_threads

    set_cpu_threads(1)
    folder, tested = tmp_path_factory.mktemp(request.param), point(*TINY, *SEVERAL_BATCHES)
    tested.trainer.checkpoint_minutes = 1000.0
    before = [stage for stage in stages_of(tested) if stage.kind in ("sft", "reference", request.param)]
    stage = next(stage for stage in before if stage.kind == request.param)
    before = before[: before.index(stage)]
    for upstream in before:
        compute_or_wait(upstream, Store(folder))
    (folder / "store").mkdir(exist_ok=True)
    shutil.copytree(folder / "store", folder / "before" / "store")
    compute_or_wait(stage, Store(folder))
    return stage, folder


@pytest.mark.parametrize("saved", [True, False])
def test_a_stage_stopped_while_it_validates_only_validates_when_it_is_run_again(
    saved, undisturbed, tmp_path, monkeypatch
):
    """The negative control, without a checkpoint at the end: it trains again."""
    stage, folder = undisturbed
    shutil.copytree(folder / "before", tmp_path, dirs_exist_ok=True)
    monkeypatch.setattr(CheckpointSchedule, "is_due_at_end", lambda schedule: saved)
    steps, labels, save = [], [], SharedRows.save
    for engine in (OneProcessEngine, AccelerateEngine):
        step = engine.step
        monkeypatch.setattr(engine, "step", lambda self, step=step: (steps.append(1), step(self))[1])

    def save_and_stop(rows, new):
        preemption.request("the time limit is near")
        save(rows, new)

    with monkeypatch.context() as patch:
        patch.setattr(SharedRows, "save", save_and_stop)
        with pytest.raises(preemption.Interrupted, match=r": validation stopped at \d+/\d+: the time limit is near"):
            compute_or_wait(stage, Store(tmp_path))
    preemption.request(None)
    assert not Store(tmp_path).is_done(stage)
    trained = len(steps)
    compute_or_wait(stage, Store(tmp_path), lambda label, done, total: labels.append(label))
    assert trained > 0 and len(steps) == (trained if saved else 2 * trained)
    assert f"{stage.label}: validation" in labels
    kinds = f"{stage.kind}/"
    again, calm = (
        {name: value for name, value in results(place).items() if name.startswith(kinds)}
        for place in (tmp_path, folder)
    )
    assert again == calm and any(name.endswith("model.safetensors") for name in calm)


def test_a_stop_in_the_last_step_saves_it_where_validation_follows(undisturbed, tmp_path, monkeypatch):
    stage, folder = undisturbed
    shutil.copytree(folder / "before", tmp_path, dirs_exist_ok=True)
    is_due = CheckpointSchedule.is_due_at_end

    def request_and_ask(schedule):
        preemption.request("a signal")
        return is_due(schedule)

    with monkeypatch.context() as patch:
        patch.setattr(CheckpointSchedule, "is_due_at_end", request_and_ask)
        with pytest.raises(preemption.Interrupted, match=r"stopped at (\d+)/\1: a signal") as stopped:
            compute_or_wait(stage, Store(tmp_path))
    preemption.request(None)
    (checkpoint,) = Store(tmp_path).work(stage).glob("checkpoints/*/step-*")
    assert f" {int(checkpoint.name[5:])}/" in str(stopped.value)


def test_a_checkpoint_is_due_at_the_end_after_half_of_the_time():
    clock = [0.0]
    schedule = CheckpointSchedule(20.0, lambda: clock[0])
    clock[0] = 599.0
    assert not schedule.is_due_at_end()
    clock[0] = 600.0
    assert schedule.is_due_at_end()
    schedule.saving()
    assert not schedule.is_due_at_end() and CheckpointSchedule(0.0).is_due_at_end()
