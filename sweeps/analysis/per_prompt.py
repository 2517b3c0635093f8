"""Quality per prompt, which intervals and paired comparisons are computed from."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from itertools import compress
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import orjson

from src.errors import ConfigError
from src.store.store import QUALITY_FILE

if TYPE_CHECKING:
    from numpy.typing import NDArray


class PromptQuality:
    """Quality of each prompt in the results of some stores; files are read on demand."""

    def __init__(self, *stores: Path) -> None:
        self.stores = stores

    def selection(self, groups: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Return (groups, prompts): quality on the selection prompts that all results have, averaged over each group.

        groups: identities of results, one group per row (the seeds of a point). All rows have the same prompt order.
        """
        return self._quality(groups, selection=True)

    def reporting(self, groups: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """Return the same for the reporting prompts."""
        return self._quality(groups, selection=False)

    def _quality(self, groups: Sequence[Sequence[str]], selection: bool) -> NDArray[np.float64]:
        tables = [[self._read(identity, selection) for identity in group] for group in groups]
        if not tables:
            return np.empty((0, 0))
        first = tables[0][0][0]
        if all(prompts == first for table in tables for prompts, _ in table):  # the usual case: no prompt was dropped
            return np.array([np.mean([values for _, values in table], axis=0) for table in tables])
        by_prompt = [[dict(zip(prompts, values, strict=True)) for prompts, values in table] for table in tables]
        common = sorted(set.intersection(*(set(values) for table in by_prompt for values in table)))
        return np.array([np.mean([[values[i] for i in common] for values in table], axis=0) for table in by_prompt])

    def _read(self, identity: str, selection: bool) -> tuple[list[int], list[float]]:
        """Return the prompts of one split and the quality of each."""
        for store in self.stores:
            path = store / "evaluate" / identity / QUALITY_FILE
            with suppress(FileNotFoundError):
                quality = orjson.loads(path.read_bytes())  # fast: a sweep may have ten thousand of these files
                mask = quality["selection"] if selection else [not selects for selects in quality["selection"]]
                return list(compress(quality["prompts"], mask)), list(compress(quality["values"], mask))
        raise ConfigError(f"{path} not found: the result was written by an older version; rerun the sweep")
