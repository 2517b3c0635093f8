"""Checkpoints of real engines and small models: who writes what, what goes on meanwhile, and what a load gives back."""

import errno
import tempfile
import threading
import time
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import pytest
import torch

from src import preemption
from src.config.schema import Lora, Training
from src.distributed import get_distributed
from src.model.numerics import FLOAT32
from src.model.packing import pack
from src.planning.resources import Resources
from src.planning.save_time import seconds_to_stop
from src.store.attempt import Attempt
from src.store.files import file_digest, read_json
from src.store.lease import Lease, LeaseLost
from src.store.store import METRICS_FILE
from src.training import training_state
from src.training.accelerate_engine import AccelerateEngine
from src.training.checkpoints import Checkpointer, Votes
from src.training.engine import TrainingEngine
from src.training.strategies import make_engine
from src.training.training_state import ShardedState
from tests.support.ranks import on_ranks
from tests.support.small_models import make_model, random_pairs

END = 100  # steps of the training that is checkpointed


@pytest.fixture(autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class Run:
    """A training whose steps and checkpoints a test takes one by one."""

    def __init__(self, engine: TrainingEngine, checkpointer: Checkpointer, attempt: Attempt) -> None:
        self.engine, self.checkpointer, self.attempt, self.step = engine, checkpointer, attempt, 0

    def train(self, steps: int = 1) -> None:
        """Take steps without deciding about checkpoints."""
        for _ in range(steps):
            batch = pack(random_pairs(2, self.step), range(2))
            with self.engine.micro_step(last=True):
                self.engine.backward(-self.engine.policy(batch)[0].sum() / 100)
            self.engine.step()
            self.step += 1
            self.attempt.tokens += 10
            if self.attempt.is_main_process:
                with (self.attempt.out / METRICS_FILE).open("a") as file:
                    file.write(f'{{"step": {self.step}}}\n')

    def resume(self) -> int:
        """Load the newest checkpoint and return its step."""
        self.step = self.checkpointer.resume(END)
        return self.step

    def end_step(self) -> None:
        """Train a step, and decide about checkpoints as the training loop does."""
        self.train()
        votes = torch.tensor(self.checkpointer.votes())
        votes = get_distributed().all_reduce_sum(votes)
        self.checkpointer.end_step(self.step, END, Votes(*votes.tolist()))

    def state(self) -> dict[str, torch.Tensor]:
        """Return weights and moments, whole, on every rank."""
        full: dict[str, torch.Tensor] = {}
        for part, tensors in training_state._state(self.engine.policy, optimizer_of(self.engine)).items():
            for name, value in tensors.items():
                for key, tensor in value.items() if part == "optimizer" else (("", value),):
                    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
                    full[f"{part}.{name}.{key}"] = whole.clone()
        return full


def optimizer_of(engine: TrainingEngine) -> torch.optim.Optimizer:
    return getattr(engine.optimizer, "optimizer", engine.optimizer)


@contextmanager
def training(
    folder: Path, strategy: str = "none", minutes: float = 1000.0, lora: Lora | None = None, **model: object
) -> Iterator[Run]:
    """Begin a training of a small model with checkpoints below `folder`."""
    resources = Resources(device="cpu", strategy=strategy)
    is_main_process = get_distributed().is_main_process
    out = folder / "out"
    out.mkdir(parents=True, exist_ok=True)
    (folder / "checkpoints").mkdir(exist_ok=True)
    lease = Lease(folder) if is_main_process else None
    with closing(make_engine(resources, Training(lr=1e-3), lora, seed=0)) as engine:
        if lease is not None:
            lease.__enter__()
        try:
            engine.prepare(lambda: make_model(**model), FLOAT32)
            attempt = Attempt(out, folder / "checkpoints", lease, lambda *_: None, "align", "id", folder)
            with closing(Checkpointer(engine, attempt, minutes)) as checkpointer:
                yield Run(engine, checkpointer, attempt)
        finally:
            if lease is not None:
                lease.__exit__(None, None, None)


def steps(folder: Path) -> list[int]:
    return sorted(int(path.name[5:]) for path in folder.glob("checkpoints/*/step-*"))


def drafts(folder: Path) -> list[Path]:
    return list(folder.glob("checkpoints/*/.draft-*"))


def equal(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


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


# Wide enough for what is written beside each tensor not to count.
WIDE = {"hidden_size": 192, "intermediate_size": 384}


def shares(folder: Path, strategy: str) -> dict[str, int]:
    """Save and resume on one rank; return the bytes it has written and hashed, and the bytes it has verified."""
    hashed: list[Path] = []
    counted = lambda path: hashed.append(path) or file_digest(path)  # noqa: E731
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("src.training.training_state.file_digest", counted)
        patch.setattr("src.training.checkpoints.file_digest", counted)
        with training(folder, strategy, **WIDE) as run:
            run.train()
            run.checkpointer.save(1)
            run.checkpointer.wait()
            rank = get_distributed().rank
            (checkpoint,) = folder.glob("checkpoints/*/step-*")
            sizes = {path.name: path.stat().st_size for path in checkpoint.iterdir()}
            count = {"written": sizes[f"__{rank}_0.distcp"]}
            count["hashed"] = sum(sizes[path.name] for path in hashed if path.suffix == ".distcp")
            hashed.clear()
            assert run.resume() == 1
            count["verified"] = sum(sizes[path.name] for path in hashed if path.suffix == ".distcp")
            count["all"] = sum(size for name, size in sizes.items() if name.endswith(".distcp"))
    return count


@pytest.mark.parametrize("strategy", ["ddp", "fsdp"])
def test_each_of_eight_ranks_writes_and_hashes_its_share(strategy, tmp_path):
    counts = on_ranks(8, strategy, shares, tmp_path, strategy)
    with training(tmp_path / "alone", **WIDE) as run:
        run.train()
        num_bytes = sum(4 * tensor.numel() for tensor in run.state().values())
    total = counts[0]["all"]
    assert num_bytes < total < 1.5 * num_bytes, "nothing is written twice"
    for what in ("written", "hashed", "verified"):
        assert sum(count[what] for count in counts) == total, what
        assert max(count[what] for count in counts) < 1.5 * total / 8, (what, counts)


@pytest.mark.parametrize(
    ("file", "rank"),
    [
        ("pytorch_model/zero_pp_rank_3_mp_rank_00_model_states.pt", 3),
        ("pytorch_model/zero_pp_rank_12_mp_rank_00_optim_states.pt", 12),
        ("pytorch_model/bf16_zero_pp_rank_7_mp_rank_00_optim_states.pt", 7),
        ("random_states_5.pkl", 5),
        *[(file, 0) for file in ("pytorch_model/mp_rank_00_model_states.pt", "latest", "zero_to_fp32.py")],
    ],
)
def test_a_rank_hashes_the_files_that_deepspeed_has_let_it_write(file, rank):
    assert training_state._writer_of(Path(file)) == rank


def save_three_steps(folder: Path, strategy: str) -> dict[str, torch.Tensor]:
    with training(folder, strategy) as run:
        run.train(3)
        run.checkpointer.save(3)
        run.checkpointer.wait()
        return run.state()


def resumed_state(folder: Path, strategy: str) -> tuple[int, dict[str, torch.Tensor]]:
    with training(folder, strategy) as run:
        return run.resume(), run.state()


@pytest.mark.parametrize(
    ("saved_by", "loaded_by"),
    [("none", "ddp"), ("ddp", "none"), ("fsdp", "fsdp of one"), ("fsdp of one", "fsdp"), ("none", "fsdp")],
)
def test_any_strategy_resumes_from_what_any_other_has_saved(saved_by, loaded_by, tmp_path):
    def on(strategy, function):
        if strategy in ("none", "fsdp of one"):
            return [function(tmp_path, strategy.removesuffix(" of one"))]
        return on_ranks(2, strategy, function, tmp_path, strategy)

    saved = on(saved_by, save_three_steps)[0]
    for step, state in on(loaded_by, resumed_state):
        assert step == 3 and equal(state, saved)


def test_one_damaged_part_is_noticed_by_all_ranks(tmp_path):
    on_ranks(2, "ddp", save_three_steps, tmp_path, "ddp")
    (part,) = tmp_path.rglob("__1_0.distcp")
    part.write_bytes(part.read_bytes()[:-1] + b"x")
    assert [step for step, _ in on_ranks(2, "ddp", resumed_state, tmp_path, "ddp")] == [0, 0]
    assert steps(tmp_path) == []


def failing_on_rank_1(folder: Path) -> tuple[int | None, str]:
    def full(self):
        if get_distributed().rank == 1:
            raise OSError(errno.ENOSPC, "No space left on device", "part 1")
        return training_state.WrittenPart({})

    with pytest.MonkeyPatch.context() as patch, training(folder, "ddp") as run:
        patch.setattr(ShardedState, "write", full)
        run.train()
        run.checkpointer.save(1)
        with pytest.raises(OSError, match="part 1") as raised:
            run.checkpointer.wait()
        return raised.value.errno, str(raised.value)


def test_a_part_that_one_rank_cannot_write_fails_all_ranks_with_that_error(tmp_path):
    outcomes = on_ranks(2, "ddp", failing_on_rank_1, tmp_path)
    assert {code for code, _ in outcomes} == {errno.ENOSPC}
    assert steps(tmp_path) == drafts(tmp_path) == []


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


def seconds_of_a_save(folder: Path, strategy: str) -> float:
    """Return the shortest of six saves of 500 MB."""
    shape = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 9, "vocab_size": 4096}
    with training(folder, strategy, **shape) as run:
        run.train()
        seconds = []
        for number in range(1, 7):
            get_distributed().barrier()
            started = time.perf_counter()
            run.checkpointer.save(number)
            run.checkpointer.wait()
            seconds.append(time.perf_counter() - started)
    return min(seconds)


@pytest.mark.timing
def test_two_ranks_save_in_at_most_three_fifths_of_the_time_of_one(tmp_path):
    """In memory: it is the work of the ranks that is divided, not that of one disk."""
    with tempfile.TemporaryDirectory(dir="/dev/shm") as folder:
        one = seconds_of_a_save(Path(folder) / "one", "none")
        two = max(on_ranks(2, "ddp", seconds_of_a_save, Path(folder) / "two", "ddp"))
    print(f"{one:.2f} s, two ranks {two:.2f} s: {two / one:.2f}")
    assert two <= 0.6 * one
