"""Likelihood displacement: training on pairs makes the preferred responses less likely."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.analysis.diagnosis.finding import Finding, is_above, mean_and_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

RULE = "likelihood displacement"
MIN_NATS = 1.0  # ours: a smaller fall of the mean is not worth a line


def displacement(
    initial: NDArray[np.float64], final: NDArray[np.float64], is_worse: bool, best_change: float | None, lr: float
) -> Finding | None:
    """Find that the chosen responses of held-out pairs have lost probability in the mean, and on most pairs.

    A margin grows just as well when the rejected response loses more (Razin et al., arXiv 2410.08847; Pal et al., arXiv
    2402.13228). This is common, and does harm where the probability goes to worse responses. So of the method's best
    point it is a note, and another one is named where its quality is worse and it lost more than the best point: a
    warning, or severe where the responses lost more than they had, so that their mean log-prob has doubled. The best
    point is judged like these where its win rate is below one half.

    initial, final: (pairs,) log-probs of the chosen responses under the initial model and the trained one, nats.
    is_worse: whether the point's quality is below that of the method's best point, or where this is it the baseline's,
    beyond noise. best_change: of the log-prob, of the best point; None where this is it, or unknown.
    """
    if len(initial) < 2:
        return None
    change = final - initial
    mean, error = mean_and_error(change)
    share = float((change < 0).mean())
    if not (mean <= -MIN_NATS and is_above(0.0, 0.0, mean, error) and share > 0.5):
        return None
    if best_change is not None and not (is_worse and mean < best_change):
        return None
    before, after = float(initial.mean()), float(final.mean())
    severity = "note" if not is_worse else "severe" if mean <= before else "warning"
    text = (
        f"the log-prob of the chosen response changed by {mean:.1f} nats in the mean (from {before:.1f} to "
        f"{after:.1f}) and fell on {100 * share:.0f} % of {len(change)} held-out pairs; "
        + ("quality is worse, too" if is_worse else "quality is not worse for it")
    )
    return Finding(RULE, severity, text, {"method": "dpop", "beta": "grid", "lr": f"{lr:g}"})


def not_measured(methods: Sequence[str], reason: str, is_measurable: bool) -> Finding:
    """Say of which methods the rule cannot tell, and why. is_measurable: by a run of a method with a reference."""
    text = f"not measured for {', '.join(methods)}: {reason}"
    return Finding(RULE, "note", text, {"method": "dpo", "beta": "0.1"} if is_measurable else {})
