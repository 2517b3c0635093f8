"""Means over prompts with their standard errors, and the split of prompts into selection and reporting."""

from __future__ import annotations

import math
import random
from collections.abc import Iterable
from typing import TypeVar

T = TypeVar("T")


def by_prompt(rows: Iterable[tuple[int, T]]) -> dict[int, list[T]]:
    """Return prompt -> what its rows have, in their order. rows: (prompt, what it has)."""
    grouped: dict[int, list[T]] = {}
    for prompt, value in rows:
        grouped.setdefault(prompt, []).append(value)
    return grouped


def selection_prompts(items: list[int], fraction: float, seed: int) -> set[int]:
    """Return the prompts that select hyper-parameters; the others report. The same for every point of a setup."""
    shuffled = sorted(items)
    random.Random(seed).shuffle(shuffled)
    return set(shuffled[: min(len(items) - 1, max(1, round(fraction * len(items))))])


def mean_and_error(values: list[float]) -> dict[str, float | None]:
    """Return the mean, its standard error (ddof 1; None for fewer than two values), and n."""
    return ratio_and_error(values, [1] * len(values))


def ratio_and_error(totals: list[float], counts: list[int]) -> dict[str, float | None]:
    """Return the sum of totals over the sum of counts, with its standard error by the delta method over their entries.

    Without a count the ratio is None, and for fewer than two entries its error is.
    """
    n, tokens = len(totals), sum(counts)
    if tokens == 0:
        return {"value": None, "se": None, "n": n}
    ratio = math.fsum(totals) / tokens
    if n < 2:
        return {"value": ratio, "se": None, "n": n}
    residual = math.fsum((t - ratio * c) ** 2 for t, c in zip(totals, counts, strict=True)) / (n - 1)
    return {"value": ratio, "se": math.sqrt(residual / n) / (tokens / n), "n": n}
