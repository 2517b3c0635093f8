"""The training loop on a small model: what its results do not depend on, what it waits for, and what it leaves."""

import gc
import itertools
import json
import os
import threading
import weakref
from collections import Counter
from contextlib import closing
from unittest import mock

import pytest
import torch

from src import preemption
from src.config.schema import Training
from src.distributed import destroy_distributed, get_distributed
from src.model.numerics import FLOAT32
from src.model.packing import PackedBatch
from src.planning.resources import Resources
from src.stages.align import make_loss_fn
from src.store.attempt import Attempt
from src.store.lease import Lease
from src.training import batches, loop, token_budget
from src.training.strategies import make_engine
from src.training.token_budget import TokenBudget
from tests.support.configs import stage_of
from tests.support.ranks import on_ranks
from tests.support.small_models import make_model, random_pairs
from tests.support.training_runs import step as training_step

NUM_EXAMPLES = 24


def train(folder, num_steps=3, *overrides):
    """Train a small model by steps of 8 pairs; return its weights, and the lines of its metrics without speed."""
    stage = stage_of("align", "method=dpo", "beta=0.1", "trainer.align.batch_size=8", "lr=1e-3",
                     f"trainer.align.max_steps={num_steps}", "trainer.align.epochs=9", *overrides)  # fmt: skip
    examples, references = random_pairs(NUM_EXAMPLES, 3), torch.linspace(-60, -40, 2 * NUM_EXAMPLES).view(-1, 2)
    folder.mkdir()
    with Lease(folder) as lease:
        attempt = Attempt(folder, folder, lease, lambda *_: None, "small", "small", folder)
        trained = loop.train(
            make_model, examples, make_loss_fn(stage.inputs, references), stage.inputs, stage.resources, attempt
        )
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return dict(trained.model.named_parameters()), [{**line, "tokens_per_second": 0} for line in lines]


def assert_identical(a, b):
    assert a[1] == b[1]
    assert a[0].keys() == b[0].keys() and all(torch.equal(a[0][name], b[0][name]) for name in a[0])


def use_budget(monkeypatch, budget):
    monkeypatch.setattr(loop, "find_token_budget", lambda *_: budget)


def test_no_bit_depends_on_which_micro_batches_are_recomputed(tmp_path, monkeypatch):
    calls = Counter()
    forward = torch.nn.Module.__call__

    def count(module, *args, **kwargs):
        calls[type(module).__name__] += type(module).__name__ == "LlamaRMSNorm"
        return forward(module, *args, **kwargs)

    results, num_calls = [], []
    for saved in (None, 150, 0):
        use_budget(monkeypatch, TokenBudget(200, saved))
        calls.clear()
        with monkeypatch.context() as counting:
            counting.setattr("torch.nn.Module.__call__", count)
            results.append(train(tmp_path / str(saved)))
        num_calls.append(calls["LlamaRMSNorm"])
    assert_identical(results[1], results[0])
    assert_identical(results[2], results[0])
    # The control: norms inside the layers of some micro-batches, and then of all, ran a second time.
    assert num_calls[0] < num_calls[1] < num_calls[2]


class Card:
    """A GPU's name for what runs on the CPU."""

    type = "cuda"


def pretend_cuda(monkeypatch):
    """Let the token budget measure on the CPU, where torch answers for 80 GiB."""
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: (70 << 30, 80 << 30))
    for name in ("memory_allocated", "max_memory_allocated", "reset_peak_memory_stats"):
        monkeypatch.setattr(torch.cuda, name, lambda device=None: 10 << 30)
    monkeypatch.setattr(PackedBatch, "to", lambda self, device: self)


@pytest.fixture
def _leave_process_group():
    with mock.patch.dict(os.environ):  # an engine sets variables that make another one look for other ranks
        yield
    destroy_distributed()


@pytest.mark.usefixtures("_leave_process_group")
@pytest.mark.parametrize(
    ("strategy", "recompute"),
    [
        *itertools.product(("none", "fsdp"), (False, True)),
        # Once, as DeepSpeed keeps the process group of its first engine.
        pytest.param("zero2", False, marks=pytest.mark.slow),
    ],
)
def test_measuring_memory_changes_no_bit_of_the_result(strategy, recompute, tmp_path, monkeypatch):
    use_budget(monkeypatch, TokenBudget(200))
    overrides = f"engine.strategy={strategy}", "engine.precision=fp32"
    expected = train(tmp_path / "unmeasured", 3, *overrides)
    pretend_cuda(monkeypatch)
    measured = []

    def measure(engine, examples):
        before = [p.detach().clone() for p in engine.policy.parameters()]
        measured.append(token_budget._measure(engine, examples[:5], recompute))
        assert all(p.grad is None for p in engine.policy.parameters())
        assert all(torch.equal(p, q) for p, q in zip(engine.policy.parameters(), before, strict=True))
        engine.checkpoint_activations(False)
        return TokenBudget(200)

    monkeypatch.setattr(loop, "find_token_budget", measure)
    assert_identical(train(tmp_path / "measured", 3, *overrides), expected)
    assert measured[0].num_tokens == sum(e.length for e in random_pairs(NUM_EXAMPLES, 3)[:5])


def test_the_host_reads_from_the_device_once_a_step(tmp_path, monkeypatch):
    """On a GPU every read waits for all kernels before it."""
    use_budget(monkeypatch, TokenBudget(200))
    reads, main = Counter(), threading.main_thread()

    def counted(name):
        original = getattr(torch.Tensor, name)

        def count(self, *args):
            reads[name] += threading.current_thread() is main
            return original(self, *args)

        return count

    for name in ("tolist", "item", "cpu", "numpy", "__float__", "__int__", "__bool__", "__index__"):
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    counts = []
    for num_steps in (2, 5):
        reads.clear()
        train(tmp_path / str(num_steps), num_steps)
        counts.append(reads.copy())
    assert counts[1] - counts[0] == Counter(tolist=3)


@pytest.mark.usefixtures("_leave_process_group")
@pytest.mark.parametrize("strategy", ["none", "fsdp"])
def test_when_training_gives_memory_back_gradients_optimizer_state_and_policy_are_gone(strategy, tmp_path, monkeypatch):
    use_budget(monkeypatch, TokenBudget(200))
    make_engine, release, references, alive = loop.make_engine, loop.release_accelerator, [], []

    def make_recorded(*arguments):
        engine = make_engine(*arguments)
        step = engine.step

        def recorded():
            held = [engine.policy, *(p.grad for p in engine.policy.parameters())]
            norm = step()
            held += [state["exp_avg"] for state in engine.optimizer.state.values()]
            references.extend(map(weakref.ref, held))
            return norm

        engine.step = recorded
        return engine

    def released():
        before = sum(reference() is not None for reference in references)
        release()
        alive.append((before, sum(reference() is not None for reference in references)))

    monkeypatch.setattr(loop, "make_engine", make_recorded)
    monkeypatch.setattr(loop, "release_accelerator", released)
    gc.disable()  # the control: whatever is collected is collected there
    try:
        trained, _ = train(tmp_path / "run", 1, f"engine.strategy={strategy}", "engine.precision=fp32")
    finally:
        gc.enable()
    assert len(references) > 2 * len(trained) and alive == [(mock.ANY, 0)]
    assert all(parameter.grad is None for parameter in trained.values())


def held_by_a_closed_engine(strategy):
    """Return how many tensors and modules a training holds, and how many beside the published model once closed."""
    with closing(make_engine(Resources(device="cpu", strategy=strategy), Training(lr=1e-3), None, 0)) as engine:
        engine.prepare(make_model, FLOAT32)
        training_step(engine, 0)
        moments = [state["exp_avg"] for state in engine.optimizer.state.values()]
        references = [weakref.ref(held) for held in (engine.policy, *engine.policy.parameters(), *moments)]
        del moments
        published = engine.gather_model()
    gc.collect()
    of_model = set(map(id, published.parameters())) if published is not None else set()
    return len(references), sum(reference() is not None and id(reference()) not in of_model for reference in references)


@pytest.mark.parametrize(("num_ranks", "strategy"), [(1, "none"), (1, "fsdp"), (2, "ddp"), (2, "fsdp")])
def test_a_closed_engine_holds_nothing_of_its_training(num_ranks, strategy):
    for before, after in on_ranks(num_ranks, strategy, held_by_a_closed_engine, strategy):
        assert before > 50 and after == 0


@pytest.mark.parametrize("ending", ["stop", "error"])
def test_no_thread_outlives_training(ending, tmp_path, monkeypatch):
    use_budget(monkeypatch, TokenBudget(200))
    prepare = batches.StepPlanner.prepare

    def prepared(planner, step):
        if step == 2 and ending == "error":
            raise OSError("rows are gone")
        if step == 2:
            preemption.request("time limit")
        return prepare(planner, step)

    monkeypatch.setattr(batches.StepPlanner, "prepare", prepared)
    try:
        with pytest.raises(preemption.Interrupted if ending == "stop" else OSError, match=r"time limit|rows are gone"):
            train(tmp_path / "run", 9)
    finally:
        preemption.request(None)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


@pytest.mark.parametrize("released", [True, False])
def test_a_second_training_stage_of_a_process_can_use_the_memory_cached_for_the_first(released, monkeypatch):
    cached = [79 << 30]  # of the 80, by torch's allocator, for a model that no longer exists
    monkeypatch.setattr(torch.cuda, "is_available", lambda: released)  # the control: nothing is released
    monkeypatch.setattr(torch.cuda, "empty_cache", cached.clear)
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device=None: ((80 << 30) - sum(cached), 80 << 30))
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device=None: 0)
    passes = []

    def measure(engine, examples, recompute):
        passes.append(sum(e.length for e in examples))
        return token_budget.Pass(passes[-1], 1 << 30, (1 << 30) + (passes[-1] << 20))

    monkeypatch.setattr(token_budget, "_measure", measure)
    resources = stage_of("align", "trainer.max_tokens_per_micro_batch=null").resources
    optimizer = torch.optim.AdamW([torch.ones(1)])
    engine = type(
        "Engine", (), {"device": Card, "resources": resources, "optimizer": optimizer, "policy": make_model()}
    )
    if released:
        assert token_budget.find_token_budget(engine, random_pairs(9, 1)).tokens == 16384
    else:
        with pytest.raises(token_budget.ConfigError, match="does not fit into the memory of the GPU"):
            token_budget.find_token_budget(engine, random_pairs(9, 1))


def measured_where_rank_1_has_no_memory(planted):
    """Return the pass that this rank has measured, or the error."""

    def out_of_memory(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    with pytest.MonkeyPatch.context() as patch:
        pretend_cuda(patch)
        with closing(make_engine(Resources(device="cpu", strategy="ddp"), Training(lr=1e-3), None, 0)) as engine:
            engine.prepare(make_model, FLOAT32)
            if planted and get_distributed().rank == 1:
                engine._model.base_model.register_forward_pre_hook(out_of_memory)
            try:
                return token_budget._measure(engine, random_pairs(3, 0), recompute=False)
            except token_budget.ConfigError as error:
                return str(error)


@pytest.mark.parametrize("planted", [True, False])
def test_a_rank_that_runs_out_of_memory_is_one_line_of_all_ranks(planted):
    first, second = on_ranks(2, "ddp", measured_where_rank_1_has_no_memory, planted)
    assert first == second
    if planted:
        tokens = sum(example.length for example in random_pairs(3, 0))
        assert f"a micro-batch of {tokens} tokens does not fit into the memory of the GPU: use" in first
    else:
        assert isinstance(first, token_budget.Pass)
