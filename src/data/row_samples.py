"""Seeded samples and orders of rows, and rows that are made when they are asked for."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from heapq import merge
from itertools import islice
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
    shares = [rows if weight is None else weight for rows, weight in zip(available, weights, strict=True)]
    tables = [(i, rows, share) for i, (rows, share) in enumerate(zip(available, shares, strict=True)) if share]
    end = min((rows / share for _, rows, share in tables), default=0.0)
    due = merge(*([((j + 0.5) / share, i) for j in range(rows)] for i, rows, share in tables))
    taken = Counter(i for time, i in islice(due, size) if time < end)
    return [taken[i] for i in range(len(available))]
