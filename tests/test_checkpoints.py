"""Checkpoints of real engines and small models: what goes on while one is written, and what a load gives back."""

import errno
import threading

import pytest

from src import preemption
from src.config.schema import Lora
from src.planning.save_time import seconds_to_stop
from src.store.files import read_json
from src.store.lease import Lease, LeaseLost
from src.store.store import METRICS_FILE
from src.training.accelerate_engine import AccelerateEngine
from src.training.training_state import ShardedState
from tests.support.checkpointed_runs import END, drafts, equal, steps, training

pytestmark = pytest.mark.usefixtures("one_thread")


@pytest.fixture
def held_back(monkeypatch) -> threading.Event:
    """Hold back every write of a checkpoint until the event is set."""
    released, write = threading.Event(), ShardedState.write

    def wait_and_write(self):
        assert released.wait(60)
        return write(self)

    monkeypatch.setattr(ShardedState, "write", wait_and_write)
    return released


def test_training_goes_on_while_a_checkpoint_is_written_and_it_has_the_state_of_its_step(held_back, tmp_path):
    with training(tmp_path) as run:
        run.train(2)
        run.checkpointer.save(2)
        at_2 = run.state()
        for _ in range(3):
            run.end_step()
        assert run.step == 5 and steps(tmp_path) == [] and len(drafts(tmp_path)) == 1
        held_back.set()
        run.checkpointer._pending.join()
        run.end_step()
        assert steps(tmp_path) == [2] and drafts(tmp_path) == []
        at_6 = run.state()
    with training(tmp_path) as run:
        assert run.resume() == 2
        assert equal(run.state(), at_2) and not equal(at_2, at_6)
        assert run.attempt.tokens == 20
        assert (run.attempt.out / METRICS_FILE).read_text().count("\n") == 2
        run.train(4)
        assert equal(run.state(), at_6), "it goes on as if nothing had happened"


def test_an_engine_that_cannot_save_in_the_background_waits_for_the_writer(held_back, monkeypatch, tmp_path):
    """The control of the test above."""
    monkeypatch.setattr(AccelerateEngine, "saves_in_background", False)
    with training(tmp_path) as run:
        run.train(2)
        threading.Timer(0.2, held_back.set).start()
        run.checkpointer.save(2)
        assert held_back.is_set() and steps(tmp_path) == [2]


def test_the_next_save_a_stop_and_the_end_wait_for_the_one_before(held_back, tmp_path):
    with training(tmp_path, minutes=0.0) as run:
        run.end_step()
        assert steps(tmp_path) == []
        threading.Timer(0.2, held_back.set).start()
        run.end_step()
        assert held_back.is_set() and steps(tmp_path)[0] == 1
        preemption.request("a test")
        try:
            with pytest.raises(preemption.Interrupted, match="align stopped at 3/100: a test"):
                run.end_step()
        finally:
            preemption.request(None)
        assert steps(tmp_path) == [2, 3], "the newest two stay"
        run.end_step()
        run.step = END - 1
        run.end_step()
        assert steps(tmp_path) == [3, 4], "the end makes no checkpoint: the model is published"


def test_a_full_disk_in_the_background_is_one_line_at_a_later_step(monkeypatch, tmp_path):
    def full(self):
        raise OSError(errno.ENOSPC, "No space left on device", str(self._folder))

    monkeypatch.setattr(ShardedState, "write", full)
    with training(tmp_path) as run:
        run.train()
        run.checkpointer.save(1)
        run.checkpointer._pending.join()
        with pytest.raises(OSError, match="No space left") as raised:
            run.end_step()
        assert raised.value.errno == errno.ENOSPC
        assert steps(tmp_path) == drafts(tmp_path) == []


def test_a_checkpoint_is_not_published_once_the_lease_is_lost(held_back, monkeypatch, tmp_path):
    def lost(self):
        raise LeaseLost("another process computes it")

    with training(tmp_path) as run:
        run.train()
        run.checkpointer.save(1)
        monkeypatch.setattr(Lease, "check", lost)
        held_back.set()
        with pytest.raises(LeaseLost):
            run.checkpointer.wait()
    assert steps(tmp_path) == []


def test_a_draft_that_a_killed_save_has_left_is_removed(held_back, tmp_path):
    draft = tmp_path / "checkpoints" / "sharded" / ".draft-12345678"
    draft.mkdir(parents=True)
    (draft / "__0_0.distcp").write_bytes(b"half of it")
    with training(tmp_path) as run:
        assert run.resume() == 0
    assert not draft.exists()


def test_adapters_are_saved_without_the_frozen_weights_and_tied_weights_once(tmp_path):
    for name, options in {"adapters": {"lora": Lora(rank=2, alpha=4)}, "tied": {"tie_word_embeddings": True}}.items():
        with training(tmp_path / name, **options) as run:
            run.train(2)
            run.checkpointer.save(2)
            run.checkpointer.wait()
            saved, trained = run.state(), [p for p in run.engine.policy.parameters() if p.requires_grad]
            num_bytes = sum(4 * p.numel() for p in trained)
        (part,) = (tmp_path / name).rglob("*.distcp")
        assert 3 * num_bytes <= part.stat().st_size < 3 * num_bytes + 2000 * len(saved)
        with training(tmp_path / name, **options) as run:
            assert run.resume() == 2 and equal(run.state(), saved)


def test_the_measured_time_of_a_save_is_recorded_for_the_next_attempt(tmp_path):
    with training(tmp_path) as run:
        run.train()
        run.checkpointer.save(1)
        run.checkpointer.wait()
        seconds = run.attempt.save_seconds
        assert preemption._reserve == seconds_to_stop(seconds) > seconds, "a job stops so long before its time limit"
    assert preemption._reserve == 0, "what follows a training saves nothing"
    (state,) = tmp_path.rglob("trainer.json")
    assert 0 < seconds < 60 and read_json(state)["save_seconds"] == seconds
    with training(tmp_path) as run:
        assert run.attempt.save_seconds is None
        run.resume()
        assert run.attempt.save_seconds == seconds
