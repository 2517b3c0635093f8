"""The scores of a response that losses compare, each a pure function of its log-prob.

`logps`: log pi(y|x) summed over response tokens, in nats; `tokens`: the number T of response tokens, at least 1;
`references`: log pi_ref(y|x), summed likewise, None for a score without reference. All are (sequences,), at least
float32, as are the scores. `src.methods.SCORES` says what each needs.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from src.methods import SCORES

# A float32 log-softmax resolves log p only to about half an ulp of 1; closer to 0 it returns 0.
_LOG_P_CEILING = -(2.0**-24)
# Where exponentials continue as their tangent. The norm of gradients squares: exp(30) squared is a float32 number.
MAX_EXPONENT = 30.0


def at_least_float32(x: Tensor) -> Tensor:
    """Return x in float32, or in float64 if it is that."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


def log1mexp(x: Tensor) -> Tensor:
    """Return `log(1 - exp(x))` for x < 0, at least float32, of x's shape, in two branches (Maechler 2012).

    Computed in bfloat16 the result is -inf for all x > -0.00195, where p rounds to 1.
    """
    x = at_least_float32(x).clamp(max=_LOG_P_CEILING)
    is_near_zero = x > -math.log(2)
    # Each branch gets only arguments in its domain, since its gradient would be NaN elsewhere even where it is unused.
    near_zero = torch.log(-torch.expm1(torch.where(is_near_zero, x, -0.5)))
    far_from_zero = torch.log1p(-torch.exp(torch.where(is_near_zero, -1.0, x)))
    return torch.where(is_near_zero, near_zero, far_from_zero)


def with_tangent(exponential: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
    """Return exp(x) or expm1(x) up to x = MAX_EXPONENT, and their tangent at that point beyond: always finite.

    exp(200) is no float32 number, and 0 times the infinity in its place, the gradient of a loss that has vanished, is
    NaN. A tangent keeps order and direction.
    """
    return exponential(x.clamp(max=MAX_EXPONENT)) + math.exp(MAX_EXPONENT) * torch.relu(x - MAX_EXPONENT)


def log_ratio(logps: Tensor, tokens: Tensor, references: Tensor) -> Tensor:
    """`r = log pi - log pi_ref` (Rafailov et al. 2023)."""
    return logps - references


def mean_log_ratio(logps: Tensor, tokens: Tensor, references: Tensor) -> Tensor:
    """`r / T` (Lambert et al. 2024, Tulu 3; TRL's IPO)."""
    return (logps - references) / tokens


def length_log_ratio(logps: Tensor, tokens: Tensor, references: Tensor, length_beta_ratio: float) -> Tensor:
    """`r + a T`, a = alpha / beta: a pair is easier the longer its chosen response (Park et al. 2024, equation 9)."""
    return logps - references + length_beta_ratio * tokens


def log_prob(logps: Tensor, tokens: Tensor, references: Tensor | None) -> Tensor:
    """`log pi` (Xu et al. 2024, CPO)."""
    return logps


def mean_log_prob(logps: Tensor, tokens: Tensor, references: Tensor | None) -> Tensor:
    """`log p = log pi / T` (Meng et al. 2024)."""
    return logps / tokens


def log_odds(logps: Tensor, tokens: Tensor, references: Tensor | None) -> Tensor:
    """`log p - log(1 - p)` (Hong et al. 2024).

    Averaged first: the log odds of a whole sequence's probability hardly differ from its log-prob.
    """
    mean = logps / tokens
    return mean - log1mexp(mean)


def alpha(logps: Tensor, tokens: Tensor, references: Tensor | None, alpha: float) -> Tensor:
    """`(1 - p^-alpha) / alpha`, and its limit log p at alpha = 0 (Gupta et al. 2025)."""
    mean = logps / tokens
    return mean if alpha == 0 else -with_tangent(torch.expm1, -alpha * mean) / alpha


def forward_kl(logps: Tensor, tokens: Tensor, references: Tensor) -> Tensor:
    """`-pi_ref / pi`, from the log-ratio (arXiv 2502.01237, v3)."""
    return -with_tangent(torch.exp, references - logps)


SCORE_FUNCTIONS: dict[str, Callable[..., Tensor]] = {name: globals()[name] for name in SCORES}


def sequence_score(
    score: str, logps: Tensor, tokens: Tensor, reference_logps: Tensor | None, **options: float
) -> Tensor:
    """Return a score of every response, (sequences,), at least float32. score: a key of SCORES; options: its fields."""
    references = None
    if SCORES[score].needs_reference:
        assert reference_logps is not None, f"{score} needs reference log-probs"
        references = at_least_float32(reference_logps)
    return SCORE_FUNCTIONS[score](at_least_float32(logps), tokens, references, **options)
