"""Gradients of bf16 weights that products add up in float32, by hand and in the engine of one process."""

from contextlib import closing

import pytest
import torch
from torch.nn.functional import embedding

from src.config.schema import Training
from src.model.grad_sums import GradSum, SummingLinear, grad_sum_of
from src.model.lm_head import Head
from src.model.logprobs import sequence_logps
from src.model.numerics import Float32Embedding, NumericsConfig
from src.model.packing import pack
from src.planning.resources import Resources
from src.training.one_process_engine import OneProcessEngine
from src.training.rounded_weights import RoundedWeights
from tests.support.small_models import make_model, random_pairs, relative
from tests.support.training_runs import start

BF16 = NumericsConfig("bf16")
MICRO_BATCHES = 8


def summed(module):
    """Return the module in bf16 with a weight whose gradients are summed, and the float32 weight that has the sum."""
    master = torch.nn.Parameter(module.weight.detach().clone())
    module.bfloat16()
    module.weight = torch.nn.Parameter(master.detach().bfloat16())
    module.weight.grad_sum = GradSum(master)
    return module, master


def inputs(rows, width, seed):
    return torch.randn(rows, width, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_layer_sums_its_weights_gradient_without_rounding_it(bias):
    linear, master = summed(torch.nn.Linear(24, 40, bias=bias))
    linear.__class__ = SummingLinear
    plain = torch.nn.Linear(24, 40, bias=bias).bfloat16()
    plain.load_state_dict(linear.state_dict())
    exact, rounded = torch.zeros(40, 24).double(), torch.zeros(40, 24)
    for seed in range(MICRO_BATCHES):
        x, plain_x = (inputs(12, 24, seed).bfloat16().view(3, 4, 24).requires_grad_() for _ in range(2))
        grad = inputs(12, 40, 100 + seed).bfloat16().view(3, 4, 40)
        y, plain_y = linear(x), plain(plain_x)
        y.backward(grad)
        plain_y.backward(grad)
        assert torch.equal(y, plain_y) and relative(x.grad.double(), plain_x.grad.double()) < 5e-3
        exact += grad.flatten(0, 1).double().t() @ x.detach().flatten(0, 1).double()
        rounded += plain.weight.grad
        plain.weight.grad = None
    assert linear.weight.grad is None and (not bias or torch.equal(linear.bias.grad, plain.bias.grad))
    assert relative(master.grad.double(), exact) < 1e-6 < 1e-4 < relative(rounded.double(), exact)


@pytest.mark.parametrize("padding", [None, 3])
def test_an_embedding_adds_the_gradients_of_the_rows_it_has_read(padding):
    embedded, master = summed(Float32Embedding(11, 6, padding_idx=padding))
    ids, expected = torch.tensor([[3, 7, 7, 0, 10]]), torch.zeros(11, 6)
    for seed in range(MICRO_BATCHES):
        exact, grad = master.detach().clone().requires_grad_(), inputs(5, 6, seed)[None]
        y = embedded(ids)
        assert y.dtype == torch.float32 and torch.equal(y[0], embedded.weight[ids[0]].float())
        y.backward(grad)
        embedding(ids, exact, padding).backward(grad)
        expected += exact.grad
    assert torch.allclose(master.grad, expected, atol=1e-6) and bool(master.grad[3].any()) == (padding is None)


def test_the_head_adds_every_chunk_to_the_sum(monkeypatch):
    monkeypatch.setattr("src.model.lm_head.token_chunk", lambda *_: 5)
    head, master = summed(Head(24, 50, bias=False))
    hidden, targets = inputs(17, 24, 0), torch.arange(17)
    exact = master.detach().bfloat16().double().requires_grad_()
    for _ in range(MICRO_BATCHES):
        with torch.autocast("cpu", torch.bfloat16):
            head.token_logps(hidden.clone().requires_grad_(), targets).sum().backward()
        logps = (hidden.bfloat16().double() @ exact.t()).log_softmax(1)
        logps.gather(1, targets[:, None]).sum().backward()
    assert head.weight.grad is None
    assert relative(master.grad.double(), exact.grad) < 3e-3  # of gradients of logits that are rounded to bf16


def gradients(model, batches, **options):
    """Return the gradients of all batches, one after another, by the engine's copies; None: as it is, in float64."""
    rounded = RoundedWeights(model, **options) if options else None
    for batch in batches:
        if rounded is None:
            sequence_logps(model, batch)[0].sum().backward()
        else:
            with rounded.in_place():
                sequence_logps(model, batch, BF16)[0].sum().backward()
    return {name: parameter.grad for name, parameter in model.named_parameters()}


def rounded_model(**changes):
    """Return a model whose weights are bf16 numbers, so that only the computation differs from float64."""
    model = make_model(**changes)
    for parameter in model.parameters():
        parameter.data = parameter.data.bfloat16().float()
    return model


@pytest.mark.parametrize("tied", [False, True])
def test_gradients_of_a_model_are_no_farther_from_float64_than_those_that_autograd_sums(tied):
    batches = [pack(random_pairs(2, seed), range(2)) for seed in range(MICRO_BATCHES)]
    exact = gradients(rounded_model(tie_word_embeddings=tied).double(), batches)
    summed, autograd = (
        gradients(rounded_model(tie_word_embeddings=tied), batches, sum_in_linear=sums) for sums in (True, False)
    )
    errors = [torch.tensor([relative(way[n].double(), exact[n]) for n in exact]) for way in (summed, autograd)]
    assert summed.keys() == exact.keys() and {g.dtype for g in summed.values()} == {torch.float32}
    assert errors[0].mean() < 1.01 * errors[1].mean() < 0.05
    assert not all(torch.equal(summed[name], autograd[name]) for name in exact), "they are two ways"


def test_weights_and_layers_are_what_they_were_after_a_micro_batch_that_fails():
    model = make_model(tie_word_embeddings=True)
    before = [(type(module), *module._parameters.values()) for module in model.modules()]
    rounded = RoundedWeights(model, sum_in_linear=True)
    with pytest.raises(RuntimeError, match="out of memory"), rounded.in_place():
        assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
        assert model.lm_head.weight is model.model.embed_tokens.weight and grad_sum_of(model.lm_head.weight)
        assert type(model.model.layers[0].mlp.up_proj) is SummingLinear
        raise RuntimeError("out of memory")
    after = [(type(module), *module._parameters.values()) for module in model.modules()]
    assert all(a is b for old, new in zip(before, after, strict=True) for a, b in zip(old, new, strict=True))


def test_frozen_weights_have_copies_and_no_sums():
    model = make_model().requires_grad_(False)
    model.model.layers[0].mlp.up_proj.requires_grad_(True)
    trained = gradients(model, [pack(random_pairs(2, 0), range(2))], sum_in_linear=True)
    assert [name for name, gradient in trained.items() if gradient is not None] == ["model.layers.0.mlp.up_proj.weight"]


def test_copies_follow_the_weights_after_a_step():
    engine = OneProcessEngine(Resources(device="cpu", strategy="fsdp"), Training(lr=1e-2), None, 0)
    with closing(engine):
        engine.prepare(start, BF16)
        batch = pack(random_pairs(2, 0), range(2))
        logps = []
        for _ in range(2):
            with engine.micro_step(last=True):
                pairs = zip(engine.policy.named_parameters(), engine._model.named_parameters(), strict=True)
                assert all(computed is same for (_, computed), (_, same) in pairs)
                values, _ = engine.policy(batch)
                engine.backward(-values.sum())
            logps.append(values.detach())
            engine.step()
        with engine.micro_step(last=True):
            copies = [p.detach().clone() for p in engine.policy.parameters()]
        assert all(torch.equal(c, p.bfloat16()) for c, p in zip(copies, engine.policy.parameters(), strict=True))
    assert logps[1].sum() > logps[0].sum() + 1, "the second micro-batch computes with what the first has learned"
