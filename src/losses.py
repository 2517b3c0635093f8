"""The alignment losses, each a pure function of the scores of two responses.

Notation (arXiv 2502.01237): `r(y) = log pi(y|x) - log pi_ref(y|x)` summed over response tokens, `p(y)` the
exponential of the mean log-prob per response token, `o(y) = log p(y) - log(1 - p(y))` its log odds,
`s` the logistic function, `b` = beta, `w` chosen, `l` rejected. Scores and losses are (pairs,) float32; docstrings give
the loss.

A method's loss is the function with its name; `src.methods.METHODS` has the score it takes.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from src.methods import METHODS

# A float32 log-softmax resolves log p only to about half an ulp of 1; closer to 0 it returns 0.
_LOG_P_CEILING = -(2.0**-24)


def log1mexp(x: Tensor) -> Tensor:
    """Return `log(1 - exp(x))` for x < 0, float32, of x's shape, in two branches (Maechler 2012).

    Computed in bfloat16 the result is -inf for all x > -0.00195, where p rounds to 1.
    """
    x = x.float().clamp(max=_LOG_P_CEILING)
    is_near_zero = x > -math.log(2)
    # Each branch gets only arguments in its domain, since its gradient would be NaN elsewhere even where it is unused.
    near_zero = torch.log(-torch.expm1(torch.where(is_near_zero, x, -0.5)))
    far_from_zero = torch.log1p(-torch.exp(torch.where(is_near_zero, -1.0, x)))
    return torch.where(is_near_zero, near_zero, far_from_zero)


def dpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-log s(b (r_w - r_l))` (Rafailov et al. 2023). Scores: log-ratios."""
    return -logsigmoid(beta * (chosen - rejected))


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`(r_w - r_l - 1/(2b))^2` (Azar et al. 2023). Scores: log-ratios, summed over tokens as in the paper."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma_beta_ratio: float) -> Tensor:
    """`-log s(b log p_w - b log p_l - gamma)`, gamma = ratio * b (Meng et al. 2024). Scores: mean log-probs."""
    return -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))


def orpo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-log s(b (o_w - o_l))` (Hong et al. 2024, with b inside). Scores: log odds."""
    return -logsigmoid(beta * (chosen - rejected))


def asft(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-log s(b o_w) - log s(-b o_l)` (Wang et al. 2024, with b inside). Scores: log odds."""
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-s(b r_w) + s(b r_l)` (D'Oosterlinck et al. 2024; others add a constant 1). Scores: log-ratios."""
    return -torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def nca(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-log s(b r_w) - 0.5 log s(-b r_w) - 0.5 log s(-b r_l)` (Chen et al. 2024). Scores: log-ratios."""
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def cal_dpo(chosen: Tensor, rejected: Tensor, beta: float, calibration_weight: float) -> Tensor:
    """`-log s(r_w - r_l) + c [(r_w - 1/(2b))^2 + (r_l + 1/(2b))^2]` (Xiao et al. 2024), no b in the sigmoid.

    The paper weights the squares with c = 1, the original repository with 0.5. Scores: log-ratios.
    """
    target = 1 / (2 * beta)
    return -logsigmoid(chosen - rejected) + calibration_weight * ((chosen - target) ** 2 + (rejected + target) ** 2)


LOSSES: dict[str, Callable[..., Tensor]] = {name: globals()[name] for name in METHODS}


class PairLoss(NamedTuple):
    """The loss of every pair, and the scores it was computed from, (pairs,) float32; scores in nats, without beta."""

    loss: Tensor
    chosen_score: Tensor
    rejected_score: Tensor


def sequence_score(kind: str, logps: Tensor, tokens: Tensor, reference_logps: Tensor | None) -> Tensor:
    """Return the score that a loss takes (`Method.score`), (sequences,) float32.

    logps, reference_logps: (sequences,) summed over response tokens, in nats; tokens: (sequences,) response tokens, at
    least 1.
    """
    logps = logps.float()
    if kind == "log_ratio":
        assert reference_logps is not None, "a log-ratio needs reference log-probs"
        return logps - reference_logps.float()
    mean = logps / tokens
    # Average first: the log odds of a whole sequence's probability hardly differ from its log-prob.
    return mean if kind == "mean_log_prob" else mean - log1mexp(mean)


def preference_loss(
    method: str,
    beta: float,
    logps: Tensor,
    tokens: Tensor,
    reference_logps: Tensor | None = None,
    *,
    sft_weight: float = 0.0,
    align_weight: float = 1.0,
    options: dict[str, float] | None = None,
) -> PairLoss:
    """Return `sft_weight * (-log p_w) + align_weight * L_align` for each pair.

    sft_weight 0, align_weight 1 is the two-stage form that sweeps compare; sft_weight 1 is the one-stage form, in
    which align_weight is the papers' lambda. Tensors are (pairs, 2), chosen and rejected: log-probs in nats, summed
    over response tokens, and numbers of response tokens.
    """
    kind = METHODS[method].score
    (chosen_logps, rejected_logps), (chosen_tokens, rejected_tokens) = logps.unbind(1), tokens.unbind(1)
    references = (None, None) if reference_logps is None else reference_logps.unbind(1)
    chosen = sequence_score(kind, chosen_logps, chosen_tokens, references[0])
    rejected = sequence_score(kind, rejected_logps, rejected_tokens, references[1])
    loss = align_weight * LOSSES[method](chosen, rejected, beta, **(options or {}))
    if sft_weight:
        loss = loss - sft_weight * chosen_logps.float() / chosen_tokens
    return PairLoss(loss, chosen, rejected)
