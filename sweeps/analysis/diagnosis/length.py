"""A gain over the baseline that the length of the responses explains."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from sweeps.analysis.diagnosis.finding import Finding, is_above, mean_and_error

if TYPE_CHECKING:
    from numpy.typing import NDArray

EXPLAINED = 0.5  # ours: share of the gain that length must explain for a warning
WORTH_A_NOTE = 0.1  # ours
NUM_RESAMPLES = 100  # of the prompts, for the error of the controlled estimate


def win_rate_at_equal_length(
    values: NDArray[np.float64], lengths: NDArray[np.float64], num_resamples: int = 0
) -> NDArray[np.float64]:
    """Return the win rate at no difference of length, of all prompts and of resamples of them, (1 + num_resamples,).

    A logistic regression of outcomes on tanh(difference / its standard deviation), as AlpacaEval 2 does with length
    (Dubois et al., arXiv 2404.04475), without its difficulties of instructions. values: (prompts,) in [0, 1], lengths:
    (prompts,) response minus baseline, not all the same.
    """
    from src.judges.style_control import win_rates_at_equal_style

    features = np.tanh(lengths / lengths.std())[:, None]
    drawn = np.random.default_rng(0).integers(len(values), size=(num_resamples, len(values)))
    return win_rates_at_equal_style(values, features, iter([np.arange(len(values)), *drawn]))


def length_explains(values: NDArray[np.float64], lengths: NDArray[np.float64], lr: float) -> Finding | None:
    """Find that a win rate above one half is smaller at equal length.

    values: (prompts,) win rates. lengths: (prompts,) of the response minus the baseline's, characters. lr: the
    point's.
    """
    if len(values) < 2 or lengths.std() == 0:
        return None
    raw, error = mean_and_error(values)
    if not is_above(raw, error, 0.5):
        return None
    (controlled,) = win_rate_at_equal_length(values, lengths).tolist()
    explained = (raw - controlled) / (raw - 0.5)
    if explained < WORTH_A_NOTE:
        return None
    controlled_error = float(win_rate_at_equal_length(values, lengths, NUM_RESAMPLES)[1:].std(ddof=1))
    is_longer = bool(lengths.mean() > 0)
    text = (
        f"responses are {abs(lengths.mean()):.0f} characters {'longer' if is_longer else 'shorter'} than the "
        f"baseline's: the win rate of {raw:.3f} ± "
        f"{error:.3f} would be {controlled:.3f} ± {controlled_error:.3f} at equal length"
    )
    is_nothing_left = not is_above(controlled, controlled_error, 0.5)
    severity = "note" if explained < EXPLAINED else "severe" if is_nothing_left else "warning"
    # R-DPO takes a reward away from the longer of two responses.
    overrides = {"method": "r_dpo", "beta": "grid", "lr": f"{lr:g}"} if is_longer else {}
    return Finding("length explains the gain", severity, text, overrides)
