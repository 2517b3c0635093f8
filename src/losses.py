"""The alignment losses, each a pure function of the scores of two responses.

Notation: `s` the score of a response (a function of `src.scores`), `b` = beta, `w` chosen, `l` rejected, `sigma` the
logistic function. Scores and losses are (pairs,) float32; docstrings give the loss, and whose it is.

`src.methods.METHODS` pairs losses with scores: DPO, for one, is `logistic` of log-ratios.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from src.methods import METHODS, SCORES
from src.scores import at_least_float32, sequence_score


def logistic(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-log sigma(b (s_w - s_l))` (Rafailov et al. 2023, DPO; Hong et al. 2024, ORPO, with b inside)."""
    return -logsigmoid(beta * (chosen - rejected))


def cross_entropy(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-log sigma(b s_w) - log sigma(-b s_l)` (Wang et al. 2024, ASFT, with b inside; Jung et al. 2024, BCO)."""
    return -logsigmoid(beta * chosen) - logsigmoid(-beta * rejected)


def ipo(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`(s_w - s_l - 1/(2b))^2` (Azar et al. 2023, whose scores are summed; TRL averages them)."""
    return (chosen - rejected - 1 / (2 * beta)) ** 2


def simpo(chosen: Tensor, rejected: Tensor, beta: float, gamma_beta_ratio: float) -> Tensor:
    """`-log sigma(b s_w - b s_l - gamma)`, gamma = ratio * b (Meng et al. 2024)."""
    return -logsigmoid(beta * (chosen - rejected - gamma_beta_ratio))


def apo_zero(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-sigma(b s_w) + sigma(b s_l)` (D'Oosterlinck et al. 2024, equation 7; others add a constant 1)."""
    return -torch.sigmoid(beta * chosen) + torch.sigmoid(beta * rejected)


def nca(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`-log sigma(b s_w) - 0.5 log sigma(-b s_w) - 0.5 log sigma(-b s_l)` (Chen et al. 2024)."""
    return -logsigmoid(beta * chosen) - 0.5 * logsigmoid(-beta * chosen) - 0.5 * logsigmoid(-beta * rejected)


def cal_dpo(chosen: Tensor, rejected: Tensor, beta: float, calibration_weight: float) -> Tensor:
    """`-log sigma(s_w - s_l) + c [(s_w - 1/(2b))^2 + (s_l + 1/(2b))^2]` (Xiao et al. 2024), no b in the sigmoid.

    The paper weights the squares with c = 1, the original repository with 0.5.
    """
    target = 1 / (2 * beta)
    return -logsigmoid(chosen - rejected) + calibration_weight * ((chosen - target) ** 2 + (rejected + target) ** 2)


def hinge(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`max(0, 1 - b (s_w - s_l))` (Zhao et al. 2023, SLiC-HF, of log-ratios as Liu et al. 2023, equation 12)."""
    return torch.relu(1 - beta * (chosen - rejected))


def robust_dpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """`[e log sigma(-b (s_w - s_l)) - (1 - e) log sigma(b (s_w - s_l))] / (1 - 2e)` (Chowdhury et al. 2024).

    Averaged over labels of which the fraction e is flipped it is the logistic loss on the true ones.
    """
    margin = beta * (chosen - rejected)
    flipped, true = label_smoothing * logsigmoid(-margin), (1 - label_smoothing) * logsigmoid(margin)
    return (flipped - true) / (1 - 2 * label_smoothing)


def cdpo(chosen: Tensor, rejected: Tensor, beta: float, label_smoothing: float) -> Tensor:
    """`-(1 - e) log sigma(b (s_w - s_l)) - e log sigma(-b (s_w - s_l))` (Mitchell 2023)."""
    margin = beta * (chosen - rejected)
    return -(1 - label_smoothing) * logsigmoid(margin) - label_smoothing * logsigmoid(-margin)


def exo_pair(chosen: Tensor, rejected: Tensor, beta: float, rejected_probability: float) -> Tensor:
    """`KL((q, 1 - q) || (1 - e, e))`, `q = sigma(b (s_w - s_l))` (Ji et al. 2024, equation 16)."""
    margin = beta * (chosen - rejected)
    chosen_term = torch.sigmoid(margin) * (logsigmoid(margin) - math.log1p(-rejected_probability))
    return chosen_term + torch.sigmoid(-margin) * (logsigmoid(-margin) - math.log(rejected_probability))


def discopop(chosen: Tensor, rejected: Tensor, beta: float, discopop_tau: float) -> Tensor:
    """`-(1 - q) log sigma(m) + q exp(-m)`, `m = b (s_w - s_l)`, `q = sigma(m / tau)` (Lu et al. 2024, equation 5)."""
    margin = beta * (chosen - rejected)
    # In one exponential: exp(-m) alone overflows where q, which is smaller still, makes the product vanish.
    exponential = torch.exp(logsigmoid(margin / discopop_tau) - margin)
    return exponential - torch.sigmoid(-margin / discopop_tau) * logsigmoid(margin)


def sppo_hard(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`(s_w - 1/(2b))^2 + (s_l + 1/(2b))^2` (Wu et al. 2024, equation 4.7 with win probabilities of 1 and 0)."""
    return (chosen - 1 / (2 * beta)) ** 2 + (rejected + 1 / (2 * beta)) ** 2


def apo_down(chosen: Tensor, rejected: Tensor, beta: float) -> Tensor:
    """`sigma(b s_w) - sigma(b (s_w - s_l))` (D'Oosterlinck et al. 2024, equation 8; others add a constant 1)."""
    return torch.sigmoid(beta * chosen) - torch.sigmoid(beta * (chosen - rejected))


def dpop(chosen: Tensor, rejected: Tensor, beta: float, penalty_weight: float) -> Tensor:
    """`-log sigma(b (s_w - s_l - c max(0, -s_w)))` (Pal et al. 2024, DPO-Positive, equation 3 as corrected in July)."""
    return -logsigmoid(beta * (chosen - rejected - penalty_weight * torch.relu(-chosen)))


LOSSES: dict[str, Callable[..., Tensor]] = {method: globals()[spec.loss] for method, spec in METHODS.items()}


class PairLoss(NamedTuple):
    """The loss of every pair, and the scores it was computed from, (pairs,) float32; scores in nats, without beta."""

    loss: Tensor
    chosen_score: Tensor
    rejected_score: Tensor


def preference_loss(
    method: str,
    beta: float,
    logps: Tensor,
    tokens: Tensor,
    reference_logps: Tensor | None = None,
    *,
    score: str | None = None,
    sft_weight: float = 0.0,
    align_weight: float = 1.0,
    options: dict[str, float] | None = None,
) -> PairLoss:
    """Return `sft_weight * (-log p_w) + align_weight * L_align` for each pair.

    sft_weight 0, align_weight 1 is the two-stage form that sweeps compare; sft_weight 1 is the one-stage form, in
    which align_weight is the papers' lambda. Tensors are (pairs, 2), chosen and rejected: log-probs in nats, summed
    over response tokens, and numbers of response tokens. score: a key of SCORES, None for the method's own; options:
    the fields of the loss and of the score.
    """
    score, options = score or METHODS[method].score, options or {}
    of_loss, of_score = (
        {name: options[name] for name in names} for names in (METHODS[method].options, SCORES[score].options)
    )
    chosen, rejected = sequence_score(score, logps, tokens, reference_logps, **of_score).unbind(1)
    loss = align_weight * LOSSES[method](chosen, rejected, beta, **of_loss)
    if sft_weight:
        loss = loss - sft_weight * at_least_float32(logps)[:, 0] / tokens[:, 0]
    return PairLoss(loss, chosen, rejected)
