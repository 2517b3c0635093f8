"""DeepSpeed's bf16: float32 master weights that start from the float32 checkpoint, and the model of one process."""

from contextlib import closing

import pytest
import torch

from src.config.schema import Training
from src.model.numerics import NumericsConfig
from src.planning.resources import Resources
from src.training.strategies import make_engine
from tests.support.ranks import on_ranks
from tests.support.training_runs import error, run_alone, run_on_two, start

pytestmark = pytest.mark.slow

# As in tests/test_fsdp.py.
BF16_ERROR = 0.1


@pytest.fixture(scope="module")
def alone():
    return run_alone("fsdp", "bf16")


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_two_ranks_in_bf16_train_what_fsdp_does_on_one(strategy, alone):
    first, second = run_on_two(strategy, "bf16")
    assert first.norms == pytest.approx(second.norms) and first.norms == pytest.approx(alone.norms, rel=0.02)
    assert error(first.weights, alone.weights) < BF16_ERROR
    assert second.weights is None
    assert {weight.dtype for weight in first.weights.values()} == {torch.float32}


@pytest.mark.parametrize("strategy", ["zero1", "zero2", "zero3"])
def test_master_weights_start_from_the_float32_checkpoint_and_feel_steps_of_3e_7(strategy):
    before = dict(start().named_parameters())
    weights = run_on_two(strategy, "bf16", num_steps=0)[0].weights
    assert all(torch.equal(weights[name], before[name]) for name in before)
    weights = run_on_two(strategy, "bf16", num_steps=2, lr=3e-7)[0].weights
    changed = torch.cat([(weights[name] != before[name]).flatten() for name in before]).double().mean()
    rounded = [(weights[name].bfloat16() != before[name].bfloat16()).flatten() for name in before]
    # The control: rounded, most are what they were.
    assert changed > 0.9 and torch.cat(rounded).double().mean() < 0.1


def buffers(strategy):
    """Return the policy's buffers where DeepSpeed casts buffers to bf16, as releases before 0.19 do."""
    from deepspeed.runtime.engine import DeepSpeedEngine

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(DeepSpeedEngine, "_mixed_precision_dtypes", lambda _: (torch.bfloat16, torch.bfloat16))
        engine = make_engine(Resources(device="cpu", strategy=strategy), Training(lr=1e-3), None, 0)
        with closing(engine):
            engine.prepare(start, NumericsConfig("bf16"))
            return {name: buffer.clone() for name, buffer in engine._model.named_buffers()}


@pytest.mark.parametrize("strategy", ["zero1", "zero3", "fsdp"])
def test_frequencies_of_positions_are_not_rounded(strategy):
    expected, (actual,) = dict(start().named_buffers()), on_ranks(1, strategy, buffers, strategy)
    assert actual.keys() == expected.keys() and len(actual) > 0
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
