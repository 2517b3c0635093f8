"""How the examples of a step are packed into micro-batches and distributed over ranks."""

import pytest
import torch

from src.data.examples import Example
from src.errors import ConfigError
from src.model.logprobs import sequence_logps
from src.model.packing import distribute_examples, pack
from src.stages.align import make_loss_fn
from src.training.loop import GlobalBatch
from src.training.token_budget import max_token_budget
from tests.support.configs import stage_of
from tests.support.small_models import make_model, random_pairs, relative


def lengths_of(count, seed=0):
    return (torch.rand(count, generator=torch.Generator().manual_seed(seed)) ** 3 * 400 + 3).int().tolist()


@pytest.mark.parametrize("num_ranks", [1, 2, 3, 8])
@pytest.mark.parametrize("budget", [1, 300, 10**6])
def test_a_step_is_split_alike_on_all_ranks_and_every_example_counts_once(num_ranks, budget):
    lengths = lengths_of(200)
    indices = list(range(30, 70))
    step = distribute_examples(lengths, indices, budget, num_ranks)
    assert step == distribute_examples(lengths, indices, budget, num_ranks)
    assert len({len(micro_batches) for micro_batches in step}) == 1, "as many micro-batches on every rank"
    computed = [[m.indices for m in micro_batches if not m.is_filler] for micro_batches in step]
    assert sorted(i for rank in computed for batch in rank for i in batch) == indices
    assert all(sum(lengths[i] for i in batch) <= budget or len(batch) == 1 for rank in computed for batch in rank)
    assert not any(micro_batches[-1].is_filler for micro_batches in step), "gradients are exchanged in the last one"
    tokens = [sum(lengths[i] for batch in rank for i in batch) for rank in computed]
    assert max(tokens) - min(tokens) <= max(lengths)


def test_a_rank_with_nothing_left_to_split_computes_fillers():
    long, short = distribute_examples([500, 100, 100, 100], [0, 1, 2, 3], 10, 2)
    assert [m.is_filler for m in long] == [True, True, False] and not any(m.is_filler for m in short)


@pytest.mark.parametrize("num_ranks", [1, 2, 3])
@pytest.mark.parametrize("budget", [1, 60, 10**6])
def test_the_gradient_of_a_step_does_not_depend_on_budget_or_number_of_ranks(num_ranks, budget):
    model, examples = make_model(), random_pairs(9, 1)
    loss_fn = make_loss_fn(stage_of("align", "method=dpo", "beta=0.1").inputs, torch.randn(9, 2))
    lengths, batch = [e.length for e in examples], GlobalBatch(9, 0)

    def gradient(step):
        """Return the sum over ranks, computed as engines do: the mean of the gradients of num_ranks times the loss."""
        total = 0.0
        for micro_batches in step:
            model.zero_grad()
            for micro_batch in micro_batches:
                packed = pack(examples, micro_batch.indices)
                loss, _ = loss_fn(packed, *sequence_logps(model, packed), batch)
                (loss * (not micro_batch.is_filler) * len(step)).backward()
            total = total + torch.cat([p.grad.flatten() for p in model.parameters()]) / len(step)
        return total

    torch.manual_seed(0)
    whole = gradient(distribute_examples(lengths, range(9), 10**6, 1))
    assert relative(gradient(distribute_examples(lengths, range(9), budget, num_ranks)), whole) < 1e-6


def test_the_token_budget_is_what_fits_in_memory_and_a_longer_example_is_an_error():
    def measure(tokens):
        return tokens, 7_000_000 + 1_000_000 * tokens  # a megabyte per token, and a constant

    assert max_token_budget(20 * 2**30, measure, longest=4096) == 16384
    assert max_token_budget(20 * 2**30 + 10**6, measure, longest=4096) == 16384, "a little more memory: the same budget"
    with pytest.raises(ConfigError, match="an example of 20000 tokens does not fit"):
        max_token_budget(20 * 2**30, measure, longest=20000)


def test_a_batch_of_one_example_is_its_tokens_with_the_second_response_after_the_first():
    batch = pack([Example((1, 2), ((3,), (4, 5)))], [0])
    assert batch.input_ids.tolist() == [[1, 2, 4]], "the last token of a response predicts nothing"
    assert batch.position_ids.tolist() == [[0, 1, 2]]
    assert batch.predict_positions.tolist() == [1, 1, 2] and batch.targets.tolist() == [3, 4, 5]
    assert batch.sequence_ids.tolist() == [0, 1, 1] and batch.input_ids.numel() == batch.layout.segments[-1].end == 3
