"""Arena-Hard v2's score at equal style: a logistic regression of games on differences of length and markdown.

The benchmark's features are the relative difference of lengths, and differences of the densities of headers, list items
and bold text outside of code blocks (show_result.py and utils/add_markdown_info.py of lmarena/arena-hard-auto). Two
things are ours:

- Features are scaled, as there, but not centered. The benchmark centers them over all models of its leaderboard. Of one
  model the center would be that model's own style, and the score nearly the one without control. Without centering it
  is the chance to win with an answer that is as long, and has as much markdown, as the baseline's.
- A token is four bytes of UTF-8: the tokenizer of the benchmark has to be downloaded, which a compute node may not do.
  Of pairs of o3-mini's answers both lengths have relative differences whose correlation is .97.
"""

from __future__ import annotations

import re
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import minimize
from scipy.special import expit

Array = NDArray[np.float64]

NUM_BYTES_OF_TOKEN = 4
RIDGE = 1e-6  # weight of the squared coefficients: games that style explains perfectly have a finite optimum too

_CODE_BLOCK = re.compile(r"```[^`]*```")
_MARKDOWN = (
    re.compile(r"^#{1,6}\s", re.MULTILINE),  # headers
    re.compile(r"^\s*(?:\d+\.|[-*+])\s", re.MULTILINE),  # list items
    re.compile(r"\*\*[^*\n]+\*\*|__[^_\n]+__"),  # bold text
)


def style_difference(response: str, baseline: str) -> Array:
    """Return (4,): the relative difference of lengths, and those of the densities of headers, list items, bold text."""
    (length, density), (other_length, other_density) = _style(response), _style(baseline)
    relative = (length - other_length) / max(length + other_length, 1.0)
    return np.array([relative, *(density - other_density) / (density + other_density + 1)])


def win_rates_at_equal_style(points: Array, differences: Array, resamplings: Iterator[NDArray[np.int64]]) -> Array:
    """Return the win rate at no difference of style, one for every resampling of the games.

    points: (games,), 1 won, .5 a tie, 0 lost. differences: (games, features). resamplings: (games,) indices each.
    """
    spread = differences.std(0, ddof=1)
    # A feature that never differs says nothing of itself: it is left out.
    features = np.column_stack([np.ones(len(points)), differences[:, spread > 0] / spread[spread > 0]])
    counts = (np.bincount(indices, minlength=len(points)) for indices in resamplings)
    return np.array([expit(_fit(features, points, weights.astype(float))[0]) for weights in counts])


def _fit(features: Array, points: Array, weights: Array) -> Array:
    """Return the coefficients of a logistic regression whose outcomes may be .5."""

    def loss(coefficients: Array) -> tuple[float, Array]:
        logits = features @ coefficients
        value = float(weights @ (np.logaddexp(0, logits) - points * logits) + RIDGE / 2 * coefficients @ coefficients)
        return value, features.T @ (weights * (expit(logits) - points)) + RIDGE * coefficients

    def hessian(coefficients: Array) -> Array:
        chances = expit(features @ coefficients)
        return (features.T * (weights * chances * (1 - chances))) @ features + RIDGE * np.eye(features.shape[1])

    start = np.zeros(features.shape[1])
    return minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options={"gtol": 1e-9}).x


def _style(text: str) -> tuple[float, Array]:
    """Return the number of tokens, and the numbers of headers, list items and bold texts per token."""
    tokens = len(text.encode(errors="replace")) / NUM_BYTES_OF_TOKEN
    prose = _CODE_BLOCK.sub("", text)
    return tokens, np.array([len(pattern.findall(prose)) for pattern in _MARKDOWN]) / (tokens + 1)
