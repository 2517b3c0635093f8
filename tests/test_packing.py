"""How the examples of a step are packed into micro-batches and distributed over ranks."""

from dataclasses import fields

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from src.data.examples import Example
from src.model.logprobs import sequence_logps
from src.model.packing import Layout, PackedBatch, Segment, copy_together, distribute_examples, pack
from src.stages.align import make_loss_fn
from src.training.loop import GlobalBatch
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


def test_a_batch_of_one_example_is_its_tokens_with_the_second_response_after_the_first():
    batch = pack([Example((1, 2), ((3,), (4, 5)))], [0])
    assert batch.input_ids.tolist() == [[1, 2, 4]], "the last token of a response predicts nothing"
    assert batch.position_ids.tolist() == [[0, 1, 2]]
    assert batch.predict_positions.tolist() == [1, 1, 2] and batch.targets.tolist() == [3, 4, 5]
    assert batch.sequence_ids.tolist() == [0, 1, 1] and batch.input_ids.numel() == batch.layout.segments[-1].end == 3


def pack_one_by_one(examples, indices):
    """`pack`, one token at a time."""
    input_ids, position_ids, segments, predict_positions, targets, sequence_ids = [], [], [], [], [], []
    num_sequences = 0
    for example in (examples[i] for i in indices):
        prompt_start, prompt_length = len(input_ids), len(example.prompt)
        prompt_end = prompt_start + prompt_length
        input_ids += example.prompt
        position_ids += range(prompt_length)
        for number, response in enumerate(example.responses):
            start = len(input_ids)
            input_ids += response[:-1]
            position_ids += range(prompt_length, prompt_length + len(response) - 1)
            if number == 0:
                segments.append(Segment(prompt_start, len(input_ids)))
            elif len(input_ids) > start:
                segments.append(Segment(start, len(input_ids), prompt_start, prompt_end))
            for i, token in enumerate(response):
                if not any(begin <= i < end for begin, end in example.unsupervised_spans):
                    predict_positions.append(start + i - 1 if i else prompt_end - 1)
                    targets.append(token)
                    sequence_ids.append(num_sequences)
            num_sequences += 1
    keys = [[*range(s.prefix_start, s.prefix_end), *range(s.start, s.end)] for s in segments]
    layout = Layout(
        tuple(segments),
        torch.tensor([position for positions in keys for position in positions]),
        torch.tensor([0, *(s.end for s in segments)], dtype=torch.int32),
        torch.tensor([sum(map(len, keys[:i])) for i in range(len(keys) + 1)], dtype=torch.int32),
        max(s.end - s.start for s in segments),
        max(map(len, keys)),
    )
    tensors = map(torch.tensor, (predict_positions, targets, sequence_ids))
    one_row = torch.tensor([input_ids]), torch.tensor([position_ids])
    return PackedBatch(*one_row, layout, *tensors, num_sequences, torch.tensor(indices))


def assert_same(actual, expected):
    """Every field has the same value, and every tensor the same type, shape and device."""
    assert type(actual) is type(expected)
    for name in (field.name for field in fields(expected)):
        a, b = getattr(actual, name), getattr(expected, name)
        if isinstance(b, Layout):
            assert_same(a, b)
        elif isinstance(b, torch.Tensor):
            assert (a.dtype, a.shape, a.device) == (b.dtype, b.shape, b.device) and torch.equal(a, b), name
        else:
            assert type(a) is type(b) and a == b, name


@st.composite
def lists_of_examples(draw):
    tokens = st.lists(st.integers(0, 60_000), min_size=1, max_size=9).map(tuple)
    examples = []
    for _ in range(draw(st.integers(1, 6))):
        responses = draw(st.lists(tokens, min_size=1, max_size=3).map(tuple))
        spans = ()
        if len(responses) == 1:
            edges = draw(st.sets(st.integers(1, len(responses[0])), max_size=4).map(sorted))
            spans = tuple(zip(edges[::2], edges[1::2], strict=False))
        examples.append(Example(draw(tokens), responses, spans))
    return examples


@settings(max_examples=150, deadline=None)
@given(lists_of_examples(), st.randoms(use_true_random=False))
def test_a_packed_batch_is_what_packing_one_token_at_a_time_gives(examples, rng):
    indices = rng.sample(range(len(examples)), rng.randint(1, len(examples)))
    assert_same(pack(examples, indices), pack_one_by_one(examples, indices))


def test_a_response_that_is_the_very_object_of_its_prompt_is_packed_as_a_response():
    tokens = (5, 6)
    assert_same(pack([Example(tokens, (tokens, (7,)))], [0]), pack_one_by_one([Example(tokens, (tokens, (7,)))], [0]))


def test_a_batch_is_copied_to_a_device_by_one_transfer_that_keeps_types_shapes_and_values():
    batch = pack(random_pairs(5, 1), [3, 0, 4])
    tensors = [batch.input_ids, batch.layout.cu_seqlens_k, batch.targets, torch.tensor([], dtype=torch.int64)]
    copies = copy_together(tensors, torch.device("cpu"))
    for tensor, copy in zip(tensors, copies, strict=True):
        assert copy.dtype == tensor.dtype and copy.shape == tensor.shape and torch.equal(copy, tensor)
    moved = batch.to(torch.device("meta"))  # has no values: where every tensor of the batch is
    of_batch, of_layout = (
        [getattr(record, field.name) for field in fields(record)] for record in (moved, moved.layout)
    )
    devices = [value.device.type for value in (*of_batch, *of_layout) if isinstance(value, torch.Tensor)]
    assert devices == ["meta"] * 9
    assert moved.layout.segments == batch.layout.segments and moved.num_sequences == batch.num_sequences
    assert moved.layout.cu_seqlens_q.dtype == torch.int32 and moved.input_ids.shape == batch.input_ids.shape
