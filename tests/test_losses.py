"""The losses against the paper's numbers and statements (arXiv 2502.01237)."""

import inspect
import math

import pytest
import torch
import yaml
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from torch.nn.functional import logsigmoid

from src.config.schema import CONF_DIR
from src.losses import LOSSES, preference_loss
from src.methods import METHODS, options_of
from src.scores import log1mexp, sequence_score

# The defaults of each method's options.
CONFIGS = {method: yaml.safe_load((CONF_DIR / "method" / f"{method}.yaml").read_text()) for method in METHODS}
OPTIONS = {
    method: {name: CONFIGS[method][name] for name in options_of(method, spec.score)} for method, spec in METHODS.items()
}
# r_w = .7, r_l = -.4: value and derivatives at b = 1 and b = .1.
VECTOR = {
    "dpo": ((0.287335, -0.249740, 0.249740), (0.639659, -0.047253)),
    "ipo": ((0.36, 1.2, -1.2), (15.21, -7.8)),
    "simpo": ((0.437488, -0.354344, 0.354344), (0.663597, -0.048500)),
    "apo_zero": ((-0.266875, -0.221713, 0.240261), (-0.027492, -0.024969)),
    "nca": ((1.211287, 0.002282, 0.200656), (1.359813, -0.022376)),
    "cal_dpo": ((0.337335, 0.150260, 0.449740), (39.937335, -8.849740)),
    "asft": ((0.916201, -0.331812, 0.401312), (1.332107, -0.048251)),
}


def loss_and_gradients(method, chosen, rejected, beta):
    w = torch.as_tensor(chosen, dtype=torch.float64).reshape(-1).requires_grad_()
    lo = torch.as_tensor(rejected, dtype=torch.float64).reshape(-1).requires_grad_()
    loss = LOSSES[method](w, lo, beta, **{name: OPTIONS[method][name] for name in METHODS[method].options})
    loss.sum().backward()
    return loss.detach(), w.grad, lo.grad


def test_the_table_of_methods_and_the_losses_have_the_same_names_and_options():
    assert METHODS.keys() == LOSSES.keys()
    for method, spec in METHODS.items():
        assert tuple(inspect.signature(LOSSES[method]).parameters) == ("chosen", "rejected", "beta", *spec.options)


@pytest.mark.parametrize("method", VECTOR)
def test_every_loss_has_the_papers_value_and_gradients(method):
    at_one, at_tenth = VECTOR[method]
    assert [x.item() for x in loss_and_gradients(method, 0.7, -0.4, 1.0)] == pytest.approx(at_one, abs=1.5e-6)
    value, chosen, _ = loss_and_gradients(method, 0.7, -0.4, 0.1)
    assert (value.item(), chosen.item()) == pytest.approx(at_tenth, abs=1.5e-6)


@pytest.mark.parametrize("method", METHODS)
@settings(max_examples=40, deadline=None)
@given(st.floats(-5, 5), st.floats(-5, 5), st.sampled_from([0.03, 0.3, 1.0, 3.0]))
def test_gradients_are_those_of_finite_differences(method, chosen, rejected, beta):
    _, by_chosen, by_rejected = loss_and_gradients(method, chosen, rejected, beta)
    h = 1e-5
    kinks = {"hinge": chosen - rejected - 1 / beta, "dpop": chosen}
    assume(abs(kinks.get(method, 1.0)) > 2 * h)
    for shift, gradient in (((h, 0), by_chosen), ((0, h), by_rejected)):
        up = loss_and_gradients(method, chosen + shift[0], rejected + shift[1], beta)[0]
        down = loss_and_gradients(method, chosen - shift[0], rejected - shift[1], beta)[0]
        assert gradient.item() == pytest.approx(((up - down) / (2 * h)).item(), rel=1e-5, abs=1e-6)


def random_log_probs(n=20_000, seed=0):
    """Return mean log-probs from nearly certain to nearly impossible, and their exponentials."""
    generator = torch.Generator().manual_seed(seed)
    p = torch.rand(n, generator=generator, dtype=torch.float64).clamp(1e-6, 1 - 1e-6)
    return p.log(), p


def odds(log_p):
    return log_p - torch.log1p(-log_p.exp())


def test_log_odds_turn_sigmoids_into_probabilities():
    log_p, p = random_log_probs()
    torch.testing.assert_close(logsigmoid(odds(log_p)), log_p)
    torch.testing.assert_close(logsigmoid(-odds(log_p)), torch.log1p(-p))


def test_asft_at_beta_one_is_binary_cross_entropy():
    (w, p_w), (lo, p_l) = random_log_probs(seed=1), random_log_probs(seed=2)
    loss = LOSSES["asft"](odds(w), odds(lo), 1.0)
    torch.testing.assert_close(loss, -p_w.log() - torch.log1p(-p_l))


@pytest.mark.parametrize("beta", [0.1, 1.0, 3.0])
def test_orpo_is_asft_plus_a_term_that_is_never_positive(beta):
    (w, _), (lo, _) = random_log_probs(seed=3), random_log_probs(seed=4)
    orpo, asft = (LOSSES[m](odds(w), odds(lo), beta) for m in ("orpo", "asft"))
    p_w, p_l = (beta * odds(w)).sigmoid(), (beta * odds(lo)).sigmoid()
    torch.testing.assert_close(orpo, asft + (p_w * (1 - p_l) + p_l * (1 - p_w)).log())
    assert (orpo <= asft).all()


def test_small_beta_makes_orpo_and_asft_collinear():
    beta = 1e-6
    for method in ("orpo", "asft"):
        _, w, lo = loss_and_gradients(method, 0.8, -1.7, beta)
        assert (w / beta).item() == pytest.approx(-0.5, rel=1e-4)
        assert (lo / beta).item() == pytest.approx(0.5, rel=1e-4)


@pytest.mark.parametrize("beta", [0.01, 0.1, 1.0])
def test_at_the_reference_every_gradient_points_along_chosen_minus_rejected(beta):
    scale = {"dpo": beta / 2, "nca": beta / 4, "apo_zero": beta / 4, "ipo": 1 / beta, "cal_dpo": 0.5 + 1 / beta}
    for method, size in scale.items():
        value, w, lo = loss_and_gradients(method, 0.0, 0.0, beta)
        assert w.item() == pytest.approx(-size) and lo.item() == pytest.approx(size)
        if method == "dpo":
            assert value.item() == pytest.approx(math.log(2))


def test_only_pointwise_losses_respond_to_a_shift_of_both_scores():
    expected = {"apo_zero": 0.01855, "nca": 0.20294, "cal_dpo": 0.6, "asft": 0.0695}
    for method, spec in METHODS.items():
        _, w, lo = loss_and_gradients(method, [0.7, -0.7], [-0.4, -0.4], 1.0)
        shifts = (w + lo).tolist()
        if spec.kind == "pairwise":
            assert shifts == pytest.approx([0, 0], abs=1e-12)
        else:
            assert max(map(abs, shifts)) > 1e-3
        if method in expected:
            assert shifts[0] == pytest.approx(expected[method], abs=5e-5)


def pair(chosen_mean, rejected_mean, tokens=10, dtype=torch.float32):
    """Return sums over `tokens` response tokens with these mean log-probs, requiring gradients, and token counts."""
    logps = torch.tensor([[chosen_mean * tokens, rejected_mean * tokens]], dtype=dtype, requires_grad=True)
    return logps, torch.full((1, 2), float(tokens))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("mean", [-0.0019, -1e-4, -1e-7, 0.0])
def test_bf16_inputs_near_certainty_have_finite_losses_and_gradients(method, mean):
    logps, tokens = pair(mean, mean / 2, dtype=torch.bfloat16)
    references = torch.zeros(1, 2) if METHODS[method].needs_reference else None
    loss = preference_loss(method, 0.5, logps, tokens, references, options=OPTIONS[method]).loss
    loss.sum().backward()
    assert loss.dtype == torch.float32
    assert all(torch.isfinite(x).all() for x in (loss, logps.grad))


def test_log1mexp_is_accurate_where_the_naive_form_in_bf16_is_infinite():
    x = -torch.logspace(-7, 1.5, 2000, dtype=torch.float64)
    exact = torch.log(-torch.expm1(x))
    torch.testing.assert_close(log1mexp(x.float()).double(), exact, rtol=2e-5, atol=1e-7)
    naive = torch.log1p(-torch.exp(x.to(torch.bfloat16)))
    assert torch.isinf(naive).any()  # the reason for two branches in float32


def test_log1mexp_has_the_exact_gradient_on_both_branches():
    x = torch.tensor([-1e-5, -0.3, -math.log(2), -0.7, -5.0, -30.0], requires_grad=True)
    log1mexp(x).sum().backward()
    exact = -(x.detach().double().exp()) / -torch.expm1(x.detach().double())
    torch.testing.assert_close(x.grad.double(), exact, rtol=1e-4, atol=1e-12)


def test_one_stage_orpo_and_asft_are_the_original_formulas():
    logps, tokens = (t.detach() for t in pair(-0.4, -1.3))
    log_p_w, o_w, o_l = torch.tensor(-0.4), odds(torch.tensor(-0.4)), odds(torch.tensor(-1.3))
    weight = 0.2
    orpo = preference_loss("orpo", 1.0, logps, tokens, sft_weight=1.0, align_weight=weight).loss
    assert orpo.item() == pytest.approx((-log_p_w - weight * logsigmoid(o_w - o_l)).item(), rel=1e-5)
    asft = preference_loss("asft", 1.0, logps, tokens, sft_weight=1.0, align_weight=weight).loss
    expected = -log_p_w - weight * (logsigmoid(o_w) + logsigmoid(-o_l))
    assert asft.item() == pytest.approx(expected.item(), rel=1e-5)


def test_sft_weight_zero_is_the_two_stage_form():
    logps, tokens = (t.detach() for t in pair(-0.4, -1.3))
    two_stage = preference_loss("orpo", 0.3, logps, tokens).loss
    expected = LOSSES["orpo"](odds(torch.tensor([-0.4])), odds(torch.tensor([-1.3])), 0.3)
    torch.testing.assert_close(two_stage, expected)


def test_length_normalized_scores_average_before_they_take_odds():
    logps, tokens = torch.tensor([-8.0]), torch.tensor([20.0])
    assert sequence_score("mean_log_prob", logps, tokens, None).item() == pytest.approx(-0.4)
    # p = e^-0.4 = 0.670320, p / (1 - p) = 2.033245. Odds of the whole sequence's probability, as some public code
    # takes them, are hardly more than that probability: averaged afterwards they give -0.4 again.
    assert sequence_score("log_odds", logps, tokens, None).item() == pytest.approx(math.log(2.033245), abs=1e-5)


def test_the_table_has_which_of_the_papers_methods_need_a_reference():
    for method in ("dpo", "ipo", "simpo", "orpo", "asft", "apo_zero", "nca", "cal_dpo"):
        assert METHODS[method].needs_reference == (method in ("dpo", "ipo", "apo_zero", "nca", "cal_dpo"))
        assert METHODS[method].kind == ("pairwise" if method in ("dpo", "ipo", "simpo", "orpo") else "pointwise")
