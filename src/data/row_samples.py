"""Seeded samples and orders of rows, and rows that are made when they are asked for."""

from __future__ import annotations

import random
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


class RowsOnDemand(Sequence[T]):
    """Rows by their numbers, each made when it is asked for."""

    def __init__(self, make_row: Callable[[int], T], numbers: Sequence[int]) -> None:
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
