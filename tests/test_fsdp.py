"""engine=fsdp trains the model of one process on two ranks, in float32 and in bf16, whatever FSDP2 keeps whole."""

from collections import Counter
from contextlib import closing
from functools import partialmethod

import pytest
import torch
from torch.distributed.fsdp._fully_shard import _fsdp_param_group
from torch.nn.functional import cosine_similarity

from src.config.schema import Lora, Training
from src.distributed import get_distributed
from src.errors import ConfigError
from src.model.numerics import FLOAT32, NumericsConfig
from src.planning.resources import Resources, fsdp_keeps_whole
from src.training.engine import empty_model
from src.training.strategies import make_engine
from tests.support.ranks import on_ranks
from tests.support.small_models import make_model
from tests.support.training_runs import (
    BOTH,
    MICRO_BATCHES,
    NEITHER,
    WEIGHTS,
    error,
    moved,
    run,
    run_alone,
    run_on_two,
    start,
    step,
)

# Error of the trained weights relative to how far they moved, from sums in another order: Adam divides gradients by
# their size, so that weights whose gradient is nearly zero move by rounding.
FP32_ERROR = 2e-3
BF16_ERROR = 0.1


@pytest.fixture(scope="module")
def alone():
    return run_alone("none")


@pytest.fixture(scope="module")
def alone_bf16():
    return run_alone("fsdp", "bf16")


def assert_identical(a, b):
    assert a.norms == b.norms and a.weights.keys() == b.weights.keys()
    assert all(torch.equal(a.weights[name], b.weights[name]) for name in a.weights)


def test_one_process_in_float32_has_the_bits_of_no_strategy(alone):
    assert_identical(run_alone("fsdp"), alone)


@pytest.mark.parametrize("keeps", [BOTH, WEIGHTS, NEITHER])
def test_two_ranks_train_what_one_process_does(keeps, alone):
    first, second = run_on_two("fsdp", keeps=keeps)
    assert first.norms == second.norms and first.norms == pytest.approx(alone.norms, rel=1e-4)
    assert error(first.weights, alone.weights) < FP32_ERROR
    assert second.weights is None
    assert {weight.dtype for weight in first.weights.values()} == {torch.float32}


@pytest.mark.parametrize("keeps", [BOTH, WEIGHTS, NEITHER])
def test_bf16_on_two_ranks_trains_what_one_process_does(keeps, alone_bf16, alone):
    first, second = run_on_two("fsdp", "bf16", keeps=keeps)
    assert first.norms == second.norms and first.norms == pytest.approx(alone_bf16.norms, rel=0.02)
    assert error(first.weights, alone_bf16.weights) < BF16_ERROR
    assert alone_bf16.norms != alone.norms, "it is bf16 that computes"
    assert cosine_similarity(moved(first.weights), moved(alone.weights), dim=0) > 0.95


def count_exchanges(keeps):
    """Return how often a step gathers weights and exchanges gradients."""
    counts = Counter()
    with pytest.MonkeyPatch.context() as patch:
        for name in ("foreach_all_gather", "foreach_reduce"):
            original = getattr(_fsdp_param_group, name)

            def counted(*arguments, name=name, original=original, **options):
                counts[name] += 1
                return original(*arguments, **options)

            patch.setattr(_fsdp_param_group, name, counted)
        run("fsdp", "bf16", num_steps=1, keeps=keeps)
    return counts


def test_what_stays_whole_is_exchanged_once_a_step_and_else_in_every_micro_batch():
    layers, rest = 6, 1
    both, weights, neither = (on_ranks(2, "fsdp", count_exchanges, keeps)[0] for keeps in (BOTH, WEIGHTS, NEITHER))
    assert both == {"foreach_all_gather": layers + rest, "foreach_reduce": layers + rest}
    assert weights == both | {"foreach_reduce": MICRO_BATCHES * (layers + rest)}
    # A layer is gathered before its forward pass and again before its backward pass.
    assert neither == weights | {"foreach_all_gather": MICRO_BATCHES * (2 * layers + rest)}


def test_of_three_billion_parameters_both_stay_whole_on_80_gb_and_of_eight_the_weights():
    three, eight, gib = int(3.2e9), int(8e9), 2**30
    assert fsdp_keeps_whole(three, 2, 80 * gib) == BOTH and fsdp_keeps_whole(three, 2, 40 * gib) == NEITHER
    assert fsdp_keeps_whole(eight, 8, 80 * gib) == WEIGHTS


def parts_of_ranks():
    """Return whether this rank has loaded the model, bytes of its shards, and what it computes first."""
    loads = []

    def load():
        loads.append(1)
        return start()

    with closing(make_engine(Resources(device="cpu", strategy="fsdp"), Training(lr=1e-3), None, 0)) as engine:
        engine.prepare(load, FLOAT32)
        shards = [parameter.to_local() for parameter in engine.policy.parameters()]
        buffers = {name: buffer.clone() for name, buffer in engine.policy.named_buffers()}
        return len(loads), sum(shard.numel() for shard in shards), buffers


def test_only_rank_0_loads_weights_and_every_rank_holds_its_share_and_all_buffers():
    num_weights = sum(parameter.numel() for parameter in start().parameters())
    (loads, size, buffers), (other_loads, other_size, other_buffers) = on_ranks(2, "fsdp", parts_of_ranks)
    assert (loads, other_loads) == (1, 0)
    assert size + other_size == num_weights and abs(size - other_size) < 0.02 * num_weights
    assert len(buffers) > 0 and all(torch.equal(buffers[name], other_buffers[name]) for name in buffers)
    expected = dict(start().named_buffers())
    assert all(torch.equal(buffer, expected[name.removeprefix("model.")]) for name, buffer in buffers.items())


def refused():
    def load():
        raise ConfigError(f"model.path: refused on rank {get_distributed().rank}")

    with closing(make_engine(Resources(device="cpu", strategy="fsdp"), Training(lr=1e-3), None, 0)) as engine:
        with pytest.raises(ConfigError) as error:
            engine.prepare(load, FLOAT32)
        return str(error.value)


def test_a_model_that_rank_0_cannot_load_is_an_error_of_all_ranks():
    assert on_ranks(2, "fsdp", refused) == ["model.path: refused on rank 0"] * 2


def test_a_gathered_model_is_built_without_random_numbers():
    with torch.random.fork_rng():
        torch.manual_seed(1)
        before = torch.get_rng_state()
        model = empty_model(type(start()), start().config)
        # The control: a model that is built as usual draws its weights.
        torch.manual_seed(1)
        assert all(p.is_meta for p in model.parameters()) and not any(b.is_meta for b in model.buffers())
        empty_model(type(model), model.config)
        assert torch.equal(torch.get_rng_state(), before)
        type(model)(model.config)
        assert not torch.equal(torch.get_rng_state(), before)
    assert model.lm_head.weight is model.model.embed_tokens.weight


def alternately_recomputed(strategy):
    """Train, recomputing activations in every other step; return also how often a layer was computed, by step."""
    calls = []

    def alternate(engine, number):
        if not calls:
            layer = engine._model.model.layers[3].mlp
            layer.register_forward_pre_hook(lambda *_: calls.__setitem__(-1, calls[-1] + 1))
        engine.checkpoint_activations(number % 2 == 1)
        calls.append(0)

    return run(strategy, before_step=alternate), calls


@pytest.mark.parametrize("strategy", ["none", "fsdp"])
def test_activations_are_recomputed_in_the_steps_that_ask_for_it_and_no_bit_changes(strategy, alone):
    ((trained, calls),) = on_ranks(1, strategy, alternately_recomputed, strategy)
    assert_identical(trained, alone)
    assert calls == [MICRO_BATCHES, 2 * MICRO_BATCHES] * 2


@pytest.mark.slow
def test_adapters_train_alike_on_one_rank_and_two(alone):
    lora = Lora(rank=4)
    expected = run_alone("none", lora=lora)
    assert_identical(run_alone("fsdp", lora=lora), expected)
    first, _ = run_on_two("fsdp", lora=lora)
    assert error(first.weights, expected.weights) < FP32_ERROR
    assert expected.weights.keys() == alone.weights.keys(), "merged"
    assert not torch.equal(
        expected.weights["model.layers.0.mlp.up_proj.weight"], start().model.layers[0].mlp.up_proj.weight
    )


def gradient_buckets():
    with closing(make_engine(Resources(device="cpu", strategy="ddp"), Training(lr=1e-3), None, 0)) as engine:
        policy = engine.prepare(start, FLOAT32)
        step(engine, 0)
        return policy.gradient_as_bucket_view


def test_gradients_of_ddp_are_views_of_what_is_sent():
    assert on_ranks(2, "ddp", gradient_buckets) == [True, True]


def first_norm(compiled):
    """Return the gradient norm of one step, and how many graphs were compiled for it."""
    compile_module = torch.nn.Module.compile
    resources = Resources(device="cpu", strategy="fsdp", compile=compiled)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.Module, "compile", partialmethod(compile_module, backend="eager"))
        # The process that this one was forked from may have compiled layers for another test.
        torch._dynamo.reset()
        torch._dynamo.utils.counters.clear()
        with closing(make_engine(resources, Training(lr=1e-3), None, 0)) as engine:
            engine.prepare(lambda: make_model(num_hidden_layers=2), NumericsConfig("bf16"))
            return step(engine, 0), torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.slow
def test_compiled_layers_under_fsdp_have_the_same_gradient_norm():
    ((expected, no_graphs),) = on_ranks(1, "fsdp", first_norm, False)
    ((norm, num_graphs),) = on_ranks(1, "fsdp", first_norm, True)
    assert norm == pytest.approx(expected, rel=1e-3) and num_graphs > no_graphs == 0
