"""Responses that never end or repeat themselves, and policies farther away than SFT went."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sweeps.analysis.diagnosis.finding import Finding, is_above

if TYPE_CHECKING:
    from collections.abc import Mapping

    import numpy as np
    from numpy.typing import NDArray

NGRAM = 4  # words, as in seq-rep-4 of Welleck et al., arXiv 1908.04319
MAX_REPEATED = 0.2  # ours: share of a response's 4-grams that occurred before; more is a response that repeats itself
WARNING_EXCESS, SEVERE_EXCESS = (
    0.05,
    0.25,
)  # ours: share of responses, beyond the initial model's, for a warning and for a severe finding
WARNING_RATIO = 2.0  # ours: times the distance of SFT, for a warning


def repeated_share(response: str) -> float:
    """Return the share of a response's 4-grams of words that it had before: 1 - different ones / all."""
    words = response.split()
    grams = list(zip(*(words[i:] for i in range(NGRAM)), strict=False))
    return 1 - len(set(grams)) / len(grams) if grams else 0.0


def repetition(
    repeated: NDArray[np.float64], initial: NDArray[np.float64] | None, overrides: Mapping[str, str]
) -> Finding | None:
    """Find that responses repeat themselves more often than those of the initial model.

    repeated, initial: (responses,) of repeated_share; None where the initial model was not sampled. overrides: what
    keeps the policy closer to where it began.
    """
    if not len(repeated):
        return None
    share = float((repeated > MAX_REPEATED).mean())
    before = float((initial > MAX_REPEATED).mean()) if initial is not None and len(initial) else None
    text = f"{_percent(share)} of {len(repeated)} responses repeat themselves (over a fifth of their 4-grams)"
    return _more("repetition", share, before, text, overrides)


def unfinished(share: float, initial: float | None, overrides: Mapping[str, str]) -> Finding | None:
    """Find that responses are cut at the limit of tokens more often than those of the initial model.

    share, initial: of the responses. overrides: as of repetition.
    """
    text = f"{_percent(share)} of the responses do not end within the limit of tokens"
    return _more("responses that do not end", share, initial, text, overrides)


def _more(rule: str, share: float, initial: float | None, text: str, overrides: Mapping[str, str]) -> Finding | None:
    """Return a finding where a share of responses is above that of the initial model, where this is known."""
    excess = share - (initial or 0.0)
    if not excess > WARNING_EXCESS:
        return None
    text += "" if initial is None else f", {_percent(initial)} of the initial model's"
    return Finding(rule, "severe" if excess > SEVERE_EXCESS else "warning", text, overrides)


def beyond_sft(kl_token: float, error: float, distance: float, overrides: Mapping[str, str]) -> Finding | None:
    """Find that alignment moved the policy farther from the SFT model than SFT had moved that.

    Two different estimates, both in nats per token: KL(policy || SFT model) of samples, and training.sft_distance.
    """
    if not (distance > 0 and is_above(kl_token, error, distance)):
        return None
    text = (
        f"KL {kl_token:.3f} nats per token is {kl_token / distance:.1f} times the {distance:.3f} by which SFT lowered "
        "the loss of a demonstration's token"
    )
    severity = "warning" if kl_token > WARNING_RATIO * distance else "note"
    return Finding("farther than SFT", severity, text, overrides)


def _percent(share: float) -> str:
    return f"{100 * share:.1f} %"
