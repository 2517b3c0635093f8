"""How many tokens a micro-batch has on a GPU: the arithmetic with simulated passes, the measuring rehearsed."""

import pytest
import torch

from src.data.examples import Example
from src.errors import ConfigError
from src.planning.fit import MAX_BUDGET, TARGET_FRACTION
from src.planning.gpus import find_gpu
from src.planning.model_shape import hub_configs
from src.rehearsal.request import Request, draw_lengths, longest_lengths, rehearse
from src.training.token_budget import (
    MIN_TOKENS_SAVED,
    Pass,
    TokenBudget,
    choose_token_budget,
    find_token_budget,
    max_tokens,
    resized,
)
from tests.support.configs import stage_of
from tests.support.small_models import random_pairs

GIB = 2**30


class Model:
    """Passes with a constant part (blocks of logits, gathered weights) and a part for every token."""

    def __init__(self, held=40 * GIB, constant=6 * GIB, saved=2**20, recomputed=2**17):
        self.held, self.constant, self.bytes_per_token = held, constant, {False: saved, True: recomputed}
        self.measured = []

    def peak(self, tokens, recompute=False):
        return self.held + self.constant + self.bytes_per_token[recompute] * tokens

    def __call__(self, tokens, recompute):
        self.measured.append((tokens, recompute))
        return Pass(tokens, self.held, self.peak(tokens, recompute))

    def limit(self, tokens, recompute=False):
        """Return the limit at which so many tokens just fit."""
        return self.peak(tokens, recompute)


@pytest.mark.parametrize("constant", [0, GIB, 20 * GIB])
@pytest.mark.parametrize("tokens", [1500, 5000, 12_345, 100_000])
def test_the_largest_pass_that_fits_counts_the_constant_part_once(constant, tokens):
    model = Model(constant=constant)
    num_tokens = max_tokens(model, model.limit(tokens), recompute=False)
    if len(model.measured) == 2:
        assert abs(num_tokens - tokens) <= 1
    else:  # a larger second pass might not have fit: a line through nothing, which is below the true one
        assert tokens < 1.1 * 1024 + 0.1 * constant / model.bytes_per_token[False]
        assert 1024 <= num_tokens <= tokens and model.peak(num_tokens) <= model.limit(tokens)


@pytest.mark.parametrize("constant", [0, GIB, 20 * GIB])
@pytest.mark.parametrize("tokens", [1000, 1500, 3000, 5000])
def test_no_pass_is_tried_that_might_not_fit_but_the_first(constant, tokens):
    model = Model(constant=constant)
    max_tokens(model, model.limit(tokens), recompute=False)
    assert model.measured[0] == (1024, False)
    assert all(model.peak(tried) <= model.limit(tokens) for tried, _ in model.measured[1:])
    if tokens < 1024:
        assert max_tokens(model, model.limit(tokens), recompute=False) == 0


def test_a_budget_is_rounded_down_so_that_a_little_more_memory_is_the_same_budget():
    model = Model()
    limits = (model.limit(9500), model.limit(9600), model.limit(9800))
    budgets = [choose_token_budget(model, limit, 4096, None, "auto").tokens for limit in limits]
    assert budgets == [9472, 9472, 9728]


@pytest.mark.parametrize("checkpointing", ["auto", True, False])
def test_more_tokens_than_a_gpu_needs_are_never_in_a_micro_batch(checkpointing):
    model = Model()
    budget = choose_token_budget(model, model.limit(10**6), 4096, None, checkpointing)
    assert budget.tokens == MAX_BUDGET
    assert {recompute for _, recompute in model.measured} == {checkpointing is True}


def test_only_a_micro_batch_that_does_not_fit_otherwise_is_recomputed():
    model = Model()
    budget = choose_token_budget(model, model.limit(5500), 8192, None, "auto")
    assert budget.tokens == 5376 and abs(budget.max_tokens_saved - 5500) <= 1
    assert not budget.recomputes(5376) and budget.recomputes(8192)
    assert {recompute for _, recompute in model.measured} == {False, True}


def test_recomputing_is_measured_only_if_an_example_needs_it():
    model = Model()
    budget = choose_token_budget(model, model.limit(8192), 8000, None, "auto")
    assert {recompute for _, recompute in model.measured} == {False} and not budget.recomputes(8000)


def test_where_hardly_anything_fits_all_micro_batches_are_large_and_recomputed():
    model = Model()
    budget = choose_token_budget(model, model.limit(MIN_TOKENS_SAVED - 500), 1000, None, "auto")
    assert budget.tokens > 8 * MIN_TOKENS_SAVED - 10**4 and budget.recomputes(budget.tokens)
    assert not budget.recomputes(1000)


@pytest.mark.parametrize("checkpointing", [True, False])
def test_a_configured_decision_holds_for_every_micro_batch(checkpointing):
    model = Model()
    budget = choose_token_budget(model, model.limit(9000), 4096, None, checkpointing)
    assert budget.max_tokens_saved is None and budget.recomputes(10**6) is None


def test_a_configured_budget_is_kept_and_its_micro_batches_are_recomputed_where_they_must_be():
    model = Model()
    budget = choose_token_budget(model, model.limit(9000), 4096, 20_000, "auto")
    assert budget.tokens == 20_000 and not budget.recomputes(8999) and budget.recomputes(20_000)
    with pytest.raises(ConfigError, match="a micro-batch of 500000 tokens does not fit"):
        choose_token_budget(model, model.limit(9000), 4096, 500_000, "auto")


@pytest.mark.parametrize("checkpointing", ["auto", True, False])
def test_an_example_that_does_not_fit_is_refused_in_one_line_that_says_what_would_help(checkpointing):
    model = Model()
    limit = model.limit(20_000, recompute=checkpointing is not False)
    with pytest.raises(ConfigError) as error:
        choose_token_budget(model, limit, 30_000, None, checkpointing)
    message = str(error.value)
    assert "an example of 30000 tokens does not fit" in message and "\n" not in message
    assert "engine=fsdp with more processes" in message and "dataset.max_tokens" in message
    assert ("engine.activation_checkpointing=auto" in message) == (checkpointing is False)


@pytest.mark.parametrize("length", [3, 100, 600, 1500, 9000])
@pytest.mark.parametrize("tokens", [1024, 4096])
def test_what_is_measured_has_the_tokens_asked_for_and_the_shape_of_the_example(length, tokens):
    response = length // 3
    example = Example((1,) * (length - 2 * response), ((2,) * (response + 1), (3,) * (response + 1)))
    measured = resized(example, tokens)
    assert sum(e.length for e in measured) == pytest.approx(tokens, rel=0.2, abs=length if length < 200 else 0)
    assert all(e.length <= example.length and len(e.responses) == 2 for e in measured)
    if length >= 100:
        share = len(measured[0].prompt) / measured[0].length
        assert share == pytest.approx(len(example.prompt) / example.length, abs=0.05)


def test_on_a_cpu_nothing_is_measured_and_nothing_recomputed():
    class Engine:
        device, resources = torch.device("cpu"), stage_of("align").resources

    assert Engine.resources.activation_checkpointing == "auto"
    budget = find_token_budget(Engine, random_pairs(3, 0))
    assert budget == TokenBudget(Engine.resources.max_tokens_per_micro_batch or 4096)


@pytest.mark.slow
def test_pairs_of_a_3b_model_fill_a_gpu_of_80_gb_to_nine_tenths_and_the_longest_one_is_recomputed():
    """Of UltraFeedback's shape, with a pair of 8,012 tokens; measured and trained on fake CUDA tensors."""
    lengths = draw_lengths(64, 180, 260, 2, max_tokens=4096, max_prompt_tokens=2048, spread=0.5)
    longest = longest_lengths(180, 2, max_tokens=4096, max_prompt_tokens=2048)
    config = hub_configs()["meta-llama/Llama-3.2-3B"]
    result = rehearse(Request("align", config, "h100", lengths, longest, strategy="fsdp", batch_size=64, layers=(2, 4)))
    assert result.error is None and result.checkpointed_micro_batches == 0 and result.micro_batches > 5
    usable = TARGET_FRACTION * find_gpu("h100").memory
    assert 0.93 * usable < result.peak <= usable
    saved = sum(result.held.values()) + 2 * result.parameters + sum(longest) * result.activation_bytes_per_token
    assert saved > usable, "so that it would not fit if it were not recomputed"
    # The host waits once a step, for the values of one list, and nothing but batches is copied to the device.
    assert list(result.syncs) == ["loop: _local_scalar_dense"]
    assert result.host_copies == {"loop: to the device": result.micro_batches + 1}
