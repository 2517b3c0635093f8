"""Quality prompt by prompt, which intervals and paired comparisons stand on."""

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
    """What the results of some stores say of each prompt; read when it is asked for."""

    def __init__(self, *stores: Path) -> None:
        self.stores = stores

    def selection(self, rows: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """One row for each group of identities, averaged over them (seeds of one point): (rows, prompts) of the prompts
        that choose hyper-parameters and that all have. Same order in every row."""
        return self._of(rows, True)

    def reporting(self, rows: Sequence[Sequence[str]]) -> NDArray[np.float64]:
        """The same of the other prompts."""
        return self._of(rows, False)

    def _of(self, rows: Sequence[Sequence[str]], selects: bool) -> NDArray[np.float64]:
        read = [[self._read(identity, selects) for identity in row] for row in rows]
        if not read:
            return np.empty((0, 0))
        first = read[0][0][0]
        if all(prompts == first for row in read for prompts, _ in row):  # as it is, unless prompts were dropped
            return np.array([np.mean([values for _, values in row], axis=0) for row in read])
        known = [[dict(zip(prompts, values, strict=True)) for prompts, values in row] for row in read]
        order = sorted(set.intersection(*(set(values) for row in known for values in row)))
        return np.array([np.mean([[values[i] for i in order] for values in row], axis=0) for row in known])

    def _read(self, identity: str, selects: bool) -> tuple[list[int], list[float]]:
        """Prompts and the quality of each, in the order of the result."""
        found = None
        for store in self.stores:
            path = store / "evaluate" / identity / QUALITY_FILE
            with suppress(FileNotFoundError):
                found = orjson.loads(path.read_bytes())  # a study may have ten thousand of them
                break
        if found is None:
            raise ConfigError(f"{path} is not there: a result of an earlier version; run the sweep again")
        own = found["selection"] if selects else [not chosen for chosen in found["selection"]]
        return list(compress(found["prompts"], own)), list(compress(found["values"], own))
