"""Steps that are prepared ahead of time in a thread."""

import contextlib
import threading

import pytest
import torch

from src.data.examples import Example
from src.distributed import DistributedContext
from src.training import batches
from src.training.batches import StepPlanner, batch_indices, prefetch
from src.training.token_budget import TokenBudget
from tests.support.small_models import random_pairs
from tests.support.waiting import wait_until

CPU = torch.device("cpu")


def prefetch_threads():
    return [thread for thread in threading.enumerate() if thread.name.startswith("prefetch")]


def test_results_are_those_of_map_in_its_order():
    assert list(prefetch(lambda x: x * x, range(20), CPU)) == [x * x for x in range(20)]
    assert list(prefetch(abs, [], CPU)) == [] and prefetch_threads() == []


def test_the_next_item_is_computed_in_another_thread_while_the_caller_uses_this_one():
    threads = {}

    def function(item):
        threads[item] = threading.current_thread()
        return item

    with contextlib.closing(prefetch(function, range(5), CPU)) as results:
        assert next(results) == 0
        wait_until(lambda: 1 in threads, 10, "the next item")
        assert threading.current_thread() not in threads.values()
        assert 2 not in threads, "not more than one ahead: a step may be large"


def test_an_exception_is_raised_where_its_item_would_be_and_the_thread_ends():
    results = prefetch(lambda x: 1 // (2 - x), range(5), CPU)
    assert [next(results), next(results)] == [0, 1]
    with pytest.raises(ZeroDivisionError):
        next(results)
    assert prefetch_threads() == []


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_the_thread_ends_with_a_caller_that_is_interrupted(error):
    with pytest.raises(error), contextlib.closing(prefetch(abs, range(100), CPU)) as results:
        for item in results:
            assert prefetch_threads()
            if item == 3:
                raise error
    assert prefetch_threads() == []


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
def test_ranks_have_as_many_micro_batches_and_recompute_the_same_ones(num_ranks, monkeypatch):
    examples = random_pairs(60, 0)
    lengths = [e.length for e in examples]
    budget = TokenBudget(tokens=60, max_tokens_saved=40)
    decided_alone = []
    for step in range(6):
        of_ranks = []
        for rank in range(num_ranks):
            monkeypatch.setattr(batches, "get_distributed", lambda rank=rank: DistributedContext(rank, num_ranks))
            of_ranks.append(StepPlanner(examples, 8, 5, budget, CPU).prepare(step))
        computed = [m.packed.example_indices.tolist() for b in of_ranks for m in b.micro_batches if not m.is_filler]
        assert sorted(i for indices in computed for i in indices) == sorted(batch_indices(step, 60, 8, 5))
        assert sum(b.num_tokens for b in of_ranks) == sum(lengths[i] for i in batch_indices(step, 60, 8, 5))
        decisions = [[m.recompute for m in b.micro_batches] for b in of_ranks]
        assert all(d == decisions[0] for d in decisions)
        tokens = [[m.packed.input_ids.numel() for m in b.micro_batches] for b in of_ranks]
        assert [max(same) > 40 for same in zip(*tokens, strict=True)] == decisions[0]
        decided_alone += [[budget.recomputes(n) for n in rank] for rank in tokens]
        assert {b.size.num_supervised_tokens for b in of_ranks} == {
            sum(examples[i].num_supervised_tokens for i in batch_indices(step, 60, 8, 5))
        }
    # The control: both decisions occur, and with several ranks each by itself would decide differently.
    assert {True, False} <= {d for rank in decided_alone for d in rank}
    if num_ranks > 1:
        assert any(decided_alone[i] != decided_alone[i + 1] for i in range(0, len(decided_alone), num_ranks))


def test_without_a_limit_of_kept_activations_nothing_is_decided():
    step = StepPlanner([Example((1, 2), ((3, 4),))], 1, 0, TokenBudget(10), CPU).prepare(0)
    assert [m.recompute for m in step.micro_batches] == [None]
