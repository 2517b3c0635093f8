"""DeepSpeed's bf16: float32 master weights that start from the float32 checkpoint, and the model of one process."""

import pytest
import torch

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
