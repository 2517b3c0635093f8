"""Training that did not get anywhere, or went the wrong way."""

from __future__ import annotations

from typing import TYPE_CHECKING, NamedTuple

from sweeps.analysis.diagnosis.finding import Z95, Finding, is_above, mean_and_error, rounded, values_text

if TYPE_CHECKING:
    from collections.abc import Sequence

    import numpy as np
    from numpy.typing import NDArray

MIN_CHANGE = 0.01  # ours: of the loss, as a share of its start
MIN_MOVED = 0.5  # ours: of the KL of the method's best point
PART = 10  # the start and the end of a run are the first and last tenth of its steps
DIVERGED = "diverged at step"  # how the error of such a run begins (src/training/loop.py)
EPSILON = 1e-8  # Adam's: gradients of a weight that are smaller move it less the smaller they are


def _ends(losses: NDArray[np.float64], least: int = 2) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the losses of the first and of the last steps of a run, at least so many."""
    count = max(least, len(losses) // PART)
    return losses[:count], losses[-count:]


def sft_distance(losses: NDArray[np.float64]) -> float:
    """Return by how much SFT made a demonstration's token more likely, nats: the fall of its loss, start to end.

    That is KL(data || before) - KL(data || after), a distance that needs no sample of the model before. losses:
    (steps,) of training, means over tokens.
    """
    start, end = _ends(losses, 1)
    return float(start.mean() - end.mean())


class DistanceMoved(NamedTuple):
    """A point, and how far it has moved from the initial model: KL per sequence, nats, with its standard error."""

    beta: float
    lr: float
    kl: float
    kl_error: float


def loss_at_start(
    losses: NDArray[np.float64], grad_norm: float, point: DistanceMoved, best: DistanceMoved | None, is_worse: bool
) -> Finding | None:
    """Find that a run has learned next to nothing, because beta or the learning rate is too small.

    A loss that barely changes does not show it by itself: with a small beta that of ORPO is nearly linear, and Adam
    makes up for its slope. So the policy must also have stayed where it began: at less than half the KL of the
    method's best point, which has a larger beta or learning rate and a better quality; or, where the point is the best
    one, at no KL beyond noise.

    losses: (steps,) of training. grad_norm: the median of its steps. best: the method's best point; None where this is
    it.
    """
    if len(losses) < 2:
        return None
    start, end = (float(part.mean()) for part in _ends(losses))
    if abs(start - end) >= MIN_CHANGE * abs(start):
        return None
    if best is None:
        if not point.kl <= Z95 * point.kl_error:
            return None
        moved = f"KL {point.kl:.2g} ± {point.kl_error:.1g} nats per sequence is none beyond noise"
    else:
        is_smaller = point.beta < best.beta or point.lr < best.lr
        if not (is_smaller and is_worse and point.kl < MIN_MOVED * best.kl):
            return None
        moved = (
            f"KL {point.kl:.2g} nats per sequence, {best.kl:.2g} of the method's best point, whose quality is better"
        )
    text = (
        f"the loss is still at its start after {len(losses)} steps ({start:.6g}, then {end:.6g}): {moved}; beta or lr "
        f"is too small (gradient norm {grad_norm:.1e}; Adam takes small steps where a weight's is below {EPSILON:g})"
    )
    more = values_text([rounded(3 * point.lr), rounded(10 * point.lr)])
    severity = "severe" if best is None else "warning"
    return Finding("loss at its start", severity, text, {"beta": f"{point.beta:g}", "lr": more})


def loss_above_start(
    losses: NDArray[np.float64], held_out: NDArray[np.float64], is_worse: bool, beta: float, lr: float
) -> Finding | None:
    """Find that the loss on held-out pairs ends above where training began, beyond noise: it diverges or overfits.

    losses: (steps,) of training; its first tenth stands for the start. held_out: (pairs,) at the end.
    """
    if len(losses) < 2 or len(held_out) < 2:
        return None
    (start, start_error), (end, error) = mean_and_error(_ends(losses)[0]), mean_and_error(held_out)
    if not is_above(end, error, start, start_error):
        return None
    text = f"the held-out loss ends at {end:.4g} ± {error:.2g}, above the {start:.4g} that training began with"
    less = values_text([rounded(lr / 3), rounded(lr / 10)])
    return Finding("loss above its start", "warning" if is_worse else "note", text, {"beta": f"{beta:g}", "lr": less})


def diverged(errors: Sequence[tuple[float, float, str]], num_points: int) -> Finding | None:
    """Find that runs of a method ended because a loss or gradient was not finite; severe where most of them did.

    errors: beta, lr and error of the method's points without a result. num_points: of the method, all of them.
    """
    hits = [(lr, beta, error) for beta, lr, error in errors if DIVERGED in error]
    if not hits:
        return None
    lr, beta, error = min(hits)
    text = (
        f"{len(hits)} of {num_points} runs diverged, the one with the smallest learning rate at lr {lr:g} and "
        f"beta {beta:g} ({error[error.index(DIVERGED) :]})"
    )
    less = values_text([rounded(lr / 3), rounded(lr / 10)])
    severity = "severe" if 2 * len(hits) > num_points else "warning"
    return Finding("diverged", severity, text, {"beta": f"{beta:g}", "lr": less})
