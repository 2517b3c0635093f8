"""Both estimates of KL(policy || initial model) against the exact one, by enumeration of every response."""

import itertools

import pytest
import torch

from src.data.examples import Example
from src.model.logprobs import iter_kl
from src.model.numerics import FLOAT32, NumericsConfig
from src.stages.measurements import kl_estimates
from tests.support.small_models import make_model

END, VOCABULARY, LONGEST = 0, 4, 3


def every_response():
    """Return all responses of a vocabulary of four: they end with the end token, or at the longest length."""
    for length in range(1, LONGEST + 1):
        for tokens in itertools.product(range(1, VOCABULARY), repeat=length - 1):
            last = range(VOCABULARY) if length == LONGEST else [END]
            yield from ((*tokens, token) for token in last)


def scores(policy, initial, numerics=FLOAT32):
    examples = [Example((1, 2), (response,)) for response in every_response()]
    columns = torch.empty(3, len(examples), dtype=torch.float64)
    for indices, *values in iter_kl(policy, initial, examples, 100, numerics):
        for column, value in zip(columns, values, strict=True):
            column[indices] = value.double()
    return columns


def moments(probability, values):
    mean = (probability * values).sum()
    return mean.item(), (probability * (values - mean) ** 2).sum().item()


@pytest.mark.parametrize(("initializer_range", "near"), [(0.02, True), (0.2, False)])
def test_both_estimates_are_unbiased_and_the_rao_blackwellized_one_varies_less(initializer_range, near):
    policy, initial = (
        make_model(seed=seed, vocab_size=VOCABULARY, num_hidden_layers=1, initializer_range=initializer_range)
        for seed in (0, 1)
    )
    logp, initial_logp, kl = scores(policy, initial)
    probability = logp.exp()
    assert probability.sum().item() == pytest.approx(1, abs=1e-5), "every response is there once"
    log_ratio = logp - initial_logp
    exact = (probability * log_ratio).sum().item()  # the definition of the KL divergence of two models
    (mean, variance), (_, variance_of_log_ratio) = moments(probability, kl), moments(probability, log_ratio)
    assert mean == pytest.approx(exact, rel=1e-4)
    assert variance < variance_of_log_ratio / (20 if near else 1)
    assert kl.min() >= 0 > log_ratio.min()
    # The negative control: with the distributions exchanged it estimates another divergence.
    assert (probability * scores(initial, policy)[2]).sum().item() != pytest.approx(exact, rel=1e-2)


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_a_policy_that_did_not_move_has_a_divergence_of_exactly_zero(precision):
    policy, initial = (make_model(vocab_size=VOCABULARY, num_hidden_layers=1) for _ in range(2))
    logp, initial_logp, kl = scores(policy, initial, NumericsConfig(precision))
    assert torch.equal(logp, initial_logp) and not kl.any()
    with torch.no_grad():
        policy.get_output_embeddings().weight[0] += 1e-2
    assert (scores(policy, initial, NumericsConfig(precision))[2] > 0).all()


def test_a_divergence_of_hundreds_of_nats_is_finite():
    """No exponential of a log-ratio is taken; Schulman's k3 of the same tokens overflows."""
    policy, initial = (make_model(vocab_size=VOCABULARY, num_hidden_layers=1) for _ in range(2))
    with torch.no_grad():
        for model, factor in ((policy, 500.0), (initial, -500.0)):
            model.get_output_embeddings().weight *= factor
    logp, initial_logp, kl = scores(policy, initial)
    assert kl.isfinite().all() and kl.max() > 1000
    assert (initial_logp - logp).exp().isinf().any()


def test_estimates_per_sequence_and_per_token_of_samples():
    rows = [
        {"index": 0, "logp": -5.0, "reference_logp": -4.0, "kl": 0.5, "tokens": 2},
        {"index": 1, "logp": -3.0, "reference_logp": -6.0, "kl": 1.5, "tokens": 6},
    ]
    kl = kl_estimates(rows)
    assert {name: kl[name]["value"] for name in kl} == {
        "per_sequence": 1.0,
        "per_token": 0.25,
        "per_sequence_rb": 1.0,
        "per_token_rb": 0.25,
    }
    assert kl["per_sequence"]["se"] == pytest.approx(2.0) and kl["per_sequence_rb"]["se"] == pytest.approx(0.5)
    # Samples of one prompt are one observation: equal ones tell nothing new. Of other prompts they would.
    assert kl_estimates([row for row in rows for _ in range(4)]) == kl
    others = [row | {"index": 4 * row["index"] + n} for row in rows for n in range(4)]
    assert kl_estimates(others)["per_sequence"]["se"] < kl["per_sequence"]["se"] / 1.5
