"""Every method of the table against its published formula, written here from log-probs, in float64; and its limits."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch.nn.functional import logsigmoid

from src.losses import LOSSES, preference_loss
from src.methods import COMPARED, FAMILY, METHODS, SCORES, options_of, scores_of
from src.scores import MAX_EXPONENT, sequence_score

OPTIONS = {
    "gamma_beta_ratio": 0.3,
    "calibration_weight": 0.7,
    "label_smoothing": 0.2,
    "rejected_probability": 0.05,
    "discopop_tau": 0.5,
    "penalty_weight": 3.0,
    "length_beta_ratio": 0.15,
    "alpha": 0.4,
}
OPTION = SimpleNamespace(**OPTIONS)


def log_sigma(x):
    return -torch.log(1 + torch.exp(-x))


def sigma(x):
    return 1 / (1 + torch.exp(-x))


def odds(mean):
    return torch.log(torch.exp(mean) / (1 - torch.exp(mean)))


def squares(p, b):
    return (p.r_w - 1 / (2 * b)) ** 2 + (p.r_l + 1 / (2 * b)) ** 2


def kl_of_two(q, target):
    return q * torch.log(q / target) + (1 - q) * torch.log((1 - q) / (1 - target))


def margin(p, b):
    return b * p.r_w - b * p.r_l


def alpha_po(p, b):
    """r(y) = b / alpha (1 - pi^(-alpha / |y|)) of chosen and rejected."""
    return (b / OPTION.alpha * (1 - torch.exp(u) ** (-OPTION.alpha / n)) for u, n in ((p.u_w, p.n_w), (p.u_l, p.n_l)))


def ratio(p, b):
    """r(y) = -b pi_ref / pi of chosen and rejected."""
    return (-b * torch.exp(v) / torch.exp(u) for u, v in ((p.u_w, p.v_w), (p.u_l, p.v_l)))


def pairwise(rewards):
    chosen, rejected = rewards
    return -log_sigma(chosen - rejected)


def pointwise(rewards):
    chosen, rejected = rewards
    return -log_sigma(chosen) - log_sigma(-rejected)


# p has log pi (u), log pi_ref (v), their difference (r) and response tokens (n) of chosen (w) and rejected (l).
FORMULAS = {
    "dpo": lambda p, b: -log_sigma(margin(p, b)),
    "ipo": lambda p, b: (p.r_w - p.r_l - 1 / (2 * b)) ** 2,
    "simpo": lambda p, b: -log_sigma(b / p.n_w * p.u_w - b / p.n_l * p.u_l - OPTION.gamma_beta_ratio * b),
    "orpo": lambda p, b: -log_sigma(b * (odds(p.u_w / p.n_w) - odds(p.u_l / p.n_l))),
    "asft": lambda p, b: -log_sigma(b * odds(p.u_w / p.n_w)) - log_sigma(-b * odds(p.u_l / p.n_l)),
    "apo_zero": lambda p, b: sigma(b * p.r_l) - sigma(b * p.r_w),
    "nca": lambda p, b: -log_sigma(b * p.r_w) - (log_sigma(-b * p.r_w) + log_sigma(-b * p.r_l)) / 2,
    "cal_dpo": lambda p, b: -log_sigma(p.r_w - p.r_l) + OPTION.calibration_weight * squares(p, b),
    "hinge": lambda p, b: torch.clamp(1 - margin(p, b), min=0),
    "robust_dpo": lambda p, b: (
        (OPTION.label_smoothing * log_sigma(-margin(p, b)) - (1 - OPTION.label_smoothing) * log_sigma(margin(p, b)))
        / (1 - 2 * OPTION.label_smoothing)
    ),
    "cdpo": lambda p, b: (
        -(1 - OPTION.label_smoothing) * log_sigma(margin(p, b)) - OPTION.label_smoothing * log_sigma(-margin(p, b))
    ),
    "exo_pair": lambda p, b: kl_of_two(sigma(margin(p, b)), torch.tensor(1 - OPTION.rejected_probability)),
    "discopop": lambda p, b: (
        (1 - sigma(margin(p, b) / OPTION.discopop_tau)) * -log_sigma(margin(p, b))
        + sigma(margin(p, b) / OPTION.discopop_tau) * torch.exp(-margin(p, b))
    ),
    # Park et al. have alpha (n_w - n_l) inside the sigmoid; alpha = length_beta_ratio * beta.
    "r_dpo": lambda p, b: -log_sigma(margin(p, b) + OPTION.length_beta_ratio * b * (p.n_w - p.n_l)),
    "ln_dpo": lambda p, b: -log_sigma(b / p.n_w * p.r_w - b / p.n_l * p.r_l),
    "alphapo": lambda p, b: pairwise(alpha_po(p, b)),
    "alphapo_point": lambda p, b: pointwise(alpha_po(p, b)),
    "forward_kl": lambda p, b: pairwise(ratio(p, b)),
    "forward_kl_point": lambda p, b: pointwise(ratio(p, b)),
    "sppo_hard": squares,
    "bco_pair": lambda p, b: -log_sigma(b * p.r_w) - log_sigma(-b * p.r_l),
    "apo_down": lambda p, b: sigma(b * p.r_w) - sigma(margin(p, b)),
    # log(pi_ref / pi) of the chosen response, where it is positive
    "dpop": lambda p, b: -log_sigma(margin(p, b) - b * OPTION.penalty_weight * torch.clamp(p.v_w - p.u_w, min=0)),
}


def random_pairs(count=400):
    """Return log-probs and reference log-probs (count, 2), of responses of 3 to 29 tokens, and their tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randint(3, 30, (count, 2), generator=generator).double()
    logps = -tokens * (0.05 + 2 * torch.rand(count, 2, generator=generator, dtype=torch.float64))
    references = logps + 1.5 * torch.randn(count, 2, generator=generator, dtype=torch.float64)
    return logps, references, tokens


def ours(method, beta, logps, references, tokens, **options):
    named = {name: OPTIONS[name] for name in options_of(method, METHODS[method].score)} | options
    return preference_loss(method, beta, logps, tokens, references, options=named).loss


def theirs(method, beta, logps, references, tokens):
    tables = {"u": logps, "v": references, "r": logps - references, "n": tokens}
    columns = {f"{name}_{side}": t[:, i] for name, t in tables.items() for i, side in enumerate("wl")}
    return FORMULAS[method](SimpleNamespace(**columns), beta)


def value_and_gradient(loss, method, beta, logps, *others):
    leaf = logps.clone().requires_grad_()
    values = loss(method, beta, leaf, *others)
    return values.detach(), torch.autograd.grad(values.sum(), leaf)[0]


@pytest.mark.parametrize("beta", [0.05, 0.4, 1.5])
@pytest.mark.parametrize("method", METHODS)
def test_loss_and_gradient_are_those_of_the_published_formula(method, beta):
    assert FORMULAS.keys() == METHODS.keys()
    expected = value_and_gradient(theirs, method, beta, *random_pairs())
    torch.testing.assert_close(value_and_gradient(ours, method, beta, *random_pairs()), expected, rtol=1e-6, atol=1e-6)
    # The negative control: no other method of the table has these losses.
    for other in METHODS.keys() - {method}:
        assert not torch.allclose(theirs(other, beta, *random_pairs()), expected[0], rtol=1e-6, atol=1e-6), other


@pytest.mark.parametrize("method", COMPARED)
def test_the_papers_methods_have_the_float32_bits_of_their_own_equations(method):
    """What is shared by methods, and computed for chosen and rejected at once, changes no bit of the paper's eight."""
    logps, references, tokens = (table.float() for table in random_pairs())
    loss = ours(method, 0.3, logps, references, tokens)
    (w, lo), (n_w, n_l) = logps.unbind(1), tokens.unbind(1)
    if METHODS[method].score == "log_ratio":
        w, lo = w - references[:, 0], lo - references[:, 1]
    else:
        w, lo = w / n_w, lo / n_l
    if METHODS[method].score == "log_odds":
        w, lo = (sequence_score("log_odds", mean, torch.ones(1), None) for mean in (w, lo))
    target, b = 1 / (2 * 0.3), 0.3
    expected = {
        "dpo": lambda: -logsigmoid(b * (w - lo)),
        "ipo": lambda: (w - lo - target) ** 2,
        "simpo": lambda: -logsigmoid(b * (w - lo - OPTION.gamma_beta_ratio)),
        "orpo": lambda: -logsigmoid(b * (w - lo)),
        "asft": lambda: -logsigmoid(b * w) - logsigmoid(-b * lo),
        "apo_zero": lambda: -torch.sigmoid(b * w) + torch.sigmoid(b * lo),
        "nca": lambda: -logsigmoid(b * w) - 0.5 * logsigmoid(-b * w) - 0.5 * logsigmoid(-b * lo),
        "cal_dpo": lambda: -logsigmoid(w - lo) + OPTION.calibration_weight * ((w - target) ** 2 + (lo + target) ** 2),
    }
    assert torch.equal(loss, expected[method]())
    assert not torch.equal(loss, ours(method, 0.30001, logps, references, tokens))


def test_methods_of_one_loss_differ_in_their_score_alone():
    w, lo = torch.randn(2, 50, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    groups = (("dpo", "orpo", "ln_dpo", "r_dpo", "alphapo", "forward_kl"),)
    groups += (("asft", "bco_pair", "alphapo_point", "forward_kl_point"),)
    for first, *others in groups:
        for other in others:
            assert torch.equal(LOSSES[first](w, lo, 0.3), LOSSES[other](w, lo, 0.3))
            assert METHODS[first].score != METHODS[other].score
    assert not torch.equal(LOSSES["dpo"](w, lo, 0.3), LOSSES["asft"](w, lo, 0.3))


@pytest.mark.parametrize(
    ("method", "option"),
    [
        ("cdpo", "label_smoothing"),
        ("robust_dpo", "label_smoothing"),
        ("dpop", "penalty_weight"),
        ("r_dpo", "length_beta_ratio"),
    ],
)
def test_limits_of_the_family_are_dpo(method, option):
    dpo = ours("dpo", 0.3, *random_pairs())
    torch.testing.assert_close(ours(method, 0.3, *random_pairs(), **{option: 0.0}), dpo)
    assert not torch.allclose(ours(method, 0.3, *random_pairs()), dpo)


@pytest.mark.parametrize("fraction", [0.0, 0.1, 0.4])
def test_on_average_over_flipped_labels_robust_dpo_is_dpo(fraction):
    w, lo = torch.randn(2, 100, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    robust, dpo = LOSSES["robust_dpo"], LOSSES["dpo"]
    right, flipped = robust(w, lo, 0.3, label_smoothing=fraction), robust(lo, w, 0.3, label_smoothing=fraction)
    torch.testing.assert_close((1 - fraction) * right + fraction * flipped, dpo(w, lo, 0.3))
    assert torch.allclose(right, dpo(w, lo, 0.3)) == (fraction == 0)


def test_sppo_hard_is_cal_dpo_without_its_logistic_term():
    cal_dpo = ours("cal_dpo", 0.3, *random_pairs(), calibration_weight=1.0)
    logistic = ours("dpo", 1.0, *random_pairs())
    torch.testing.assert_close(ours("sppo_hard", 0.3, *random_pairs()), cal_dpo - logistic)


def test_alpha_zero_is_the_mean_log_prob_and_the_limit():
    logps, _, tokens = random_pairs()
    means = sequence_score("mean_log_prob", logps, tokens, None)
    assert torch.equal(sequence_score("alpha", logps, tokens, None, alpha=0.0), means)
    torch.testing.assert_close(sequence_score("alpha", logps, tokens, None, alpha=1e-7), means)
    assert not torch.allclose(sequence_score("alpha", logps, tokens, None, alpha=0.1), means)


def test_discopop_has_the_papers_critical_points():
    """Lu et al. 2024, section 5: at beta = .05 the slope is 0 where the margin is -2.3714 and 1.44012."""
    margins = torch.tensor([-2.3714, 1.44012, 0.0], dtype=torch.float64, requires_grad=True)
    LOSSES["discopop"](margins, torch.zeros(3), 0.05, discopop_tau=0.05).sum().backward()
    assert margins.grad[:2].tolist() == pytest.approx([0, 0], abs=1e-6)
    assert margins.grad[2] > 0.03  # between them a step lowers the margin


@pytest.mark.parametrize("method", ["forward_kl", "forward_kl_point"])
@pytest.mark.parametrize("ratios", [(0.0, -200.0), (-200.0, 0.0), (-200.0, -200.0), (-200.0, -190.0), (200.0, -200.0)])
def test_forward_kl_is_finite_where_the_ratio_overflows(method, ratios):
    logps = torch.tensor([ratios], requires_grad=True)
    tokens, references = torch.full((1, 2), 50.0), torch.zeros(1, 2)
    loss = preference_loss(method, 0.1, logps, tokens, references).loss
    ((by_chosen, by_rejected),) = torch.autograd.grad(loss.sum(), logps)[0].tolist()
    assert loss.isfinite().all() and math.isfinite(by_chosen) and math.isfinite(by_rejected)
    if ratios == (0.0, -200.0):  # learned: no loss of the margin, and no pull on the rejected response
        assert by_rejected == 0 and (method == "forward_kl_point" or loss.item() == by_chosen == 0)
    if ratios[0] == -200 and ratios[1] > -200:
        assert by_chosen < -1e10  # what the overflow would lose: the chosen response is pulled up

    # The negative control: the ratio itself.
    score = -torch.exp(references) / torch.exp(logps)
    naive = torch.autograd.grad(LOSSES[method](*score.unbind(1), 0.1).sum(), logps)[0]
    assert not naive.isfinite().all()


def test_exponentials_are_exact_up_to_their_tangent_and_keep_the_order_beyond():
    ratios = torch.linspace(-60, 5, 400, dtype=torch.float64)
    score = sequence_score("forward_kl", ratios, torch.ones(400), torch.zeros(400))
    exact = ratios > -MAX_EXPONENT
    torch.testing.assert_close(score[exact], -torch.exp(-ratios[exact]))
    assert (score.diff() > 0).all() and (score[~exact] > -torch.exp(-ratios[~exact])).all()


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("margin", [-2000.0, 2000.0])
def test_losses_and_gradients_are_finite_however_far_the_policy_has_moved(method, margin):
    logps = torch.tensor([[-2500.0 + margin, -2500.0]], requires_grad=True)
    options = {name: OPTIONS[name] for name in options_of(method, METHODS[method].score)}
    tokens, references = torch.full((1, 2), 100.0), torch.full((1, 2), -2500.0)
    loss = preference_loss(method, 0.5, logps, tokens, references, options=options).loss
    (gradient,) = torch.autograd.grad(loss.sum(), logps)
    assert loss.isfinite().all() and gradient.isfinite().all()


def test_another_score_is_that_of_the_formula():
    """TRL's IPO: log ratios averaged over tokens."""
    logps, references, tokens = random_pairs()
    means = (logps - references) / tokens
    loss = preference_loss("ipo", 0.3, logps, tokens, references, score="mean_log_ratio").loss
    torch.testing.assert_close(loss, (means[:, 0] - means[:, 1] - 1 / 0.6) ** 2)
    assert not torch.allclose(loss, ours("ipo", 0.3, logps, references, tokens))


def test_pointwise_methods_take_scores_that_can_be_positive_or_those_of_their_loss():
    assert all(scores_of(method) == list(SCORES) for method, spec in METHODS.items() if spec.kind == "pairwise")
    signed = ["log_ratio", "mean_log_ratio", "length_log_ratio", "log_odds"]
    assert scores_of("nca") == scores_of("dpop") == signed
    assert set(scores_of("asft")) == {*signed, "alpha", "forward_kl"} == set(scores_of("alphapo_point"))
    for method, spec in METHODS.items():
        assert spec.score in scores_of(method)
    logps, references, tokens = random_pairs()
    for name, score in SCORES.items():
        options = {option: OPTIONS[option] for option in score.options}
        values = sequence_score(name, logps, tokens, references, **options)
        assert (values > 0).any() == score.is_signed, name


def test_the_family_is_beside_the_papers_eight():
    assert list(COMPARED) == ["dpo", "ipo", "simpo", "orpo", "asft", "apo_zero", "nca", "cal_dpo"]
    assert not COMPARED.keys() & FAMILY.keys() and len(FAMILY) == 15
