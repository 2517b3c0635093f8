"""Seeded samples and orders of rows, and rows that are made when they are asked for."""

from __future__ import annotations

import random
from bisect import bisect_left
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

T = TypeVar("T")


class RowsOnDemand(Sequence[T]):
    """Rows by their numbers, or whatever else says which they are, each made when it is asked for."""

    def __init__(self, make_row: Callable[[Any], T], numbers: Sequence[Any]) -> None:
        self._make_row, self._numbers = make_row, numbers

    def __len__(self) -> int:
        return len(self._numbers)

    def __getitem__(self, index: Any) -> Any:
        """Return the row at an index, or those of a slice."""
        if isinstance(index, slice):
            return RowsOnDemand(self._make_row, self._numbers[index])
        return self._make_row(self._numbers[index])


def sample_indices(num_rows: int, num_samples: int | None, seed: int | str) -> list[int]:
    """Return a seeded sample of range(num_rows), ascending; num_samples=None: all.

    A smaller sample is a subset of every larger one of the same seed.
    """
    return sorted(shuffled_indices(num_rows, seed)[:num_samples])


def shuffled_indices(num_rows: int, seed: int | str) -> list[int]:
    """Return range(num_rows) in a seeded order."""
    order = list(range(num_rows))
    random.Random(seed).shuffle(order)
    return order


def rows_of_each(available: Sequence[int], weights: Sequence[float | None], size: int | None) -> list[int]:
    """Return how many rows of each table a mixture has: in proportion to the weights, at most `size` in all.

    No row is taken twice, so that a mixture ends with the last row of the first table that has no more. A table
    without a weight weighs as much as it has rows. Row j of a table is due at (j + 1/2) / weight (Webster's divisors),
    so that every table has, of any number of rows, its share of them, rounded, and a smaller mixture is part
    of a larger one.
    """
    if len(available) == 1:
        return [available[0] if size is None else min(size, available[0])]
    shares = _shares(available, weights)
    end = min((rows / share for rows, share in zip(available, shares, strict=True) if share), default=0.0)
    counts = _due_before(end, available, shares)
    if size is None or sum(counts) <= size:
        return counts
    # All but a few at once: a table may have billions of rows.
    counts = _due_before((size - len(available)) / sum(shares), available, shares)
    while sum(counts) < size:
        counts[min((i for i, share in enumerate(shares) if share), key=lambda i: (_due(counts[i], shares[i]), i))] += 1
    return counts


def mixed_order(
    counts: Sequence[int], available: Sequence[int], weights: Sequence[float | None]
) -> list[tuple[int, int]]:
    """Return (table, which of its rows) of all rows of a mixture, so that the first ones are in proportion, too.

    counts: of rows_of_each, for these rows and weights.
    """
    shares = _shares(available, weights)
    places = ((i, j) for i, count in enumerate(counts) for j in range(count))
    return sorted(places, key=lambda place: (_due(place[1], shares[place[0]]), place))


def _shares(available: Sequence[int], weights: Sequence[float | None]) -> list[float]:
    return [rows if weight is None else weight for rows, weight in zip(available, weights, strict=True)]


def _due(row: int, share: float) -> float:
    return (row + 0.5) / share


def _due_before(time: float, available: Sequence[int], shares: Sequence[float]) -> list[int]:
    """Return how many rows of each table are due before a time."""
    return [
        bisect_left(range(rows), time, key=partial(_due, share=share)) if share else 0
        for rows, share in zip(available, shares, strict=True)
    ]
