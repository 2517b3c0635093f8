"""Tables of the Hugging Face hub, or local copies of them: which rows are read, and which are left out."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

from src.data.adapters import adapted
from src.data.rows import (
    Demonstration,
    Pair,
    Prompt,
    Row,
    demonstration_from,
    distinct_prompts,
    pair_from,
    sample_indices,
)
from src.errors import ConfigError
from src.planning.identity import DataInputs, TableInputs

if TYPE_CHECKING:
    import datasets

T = TypeVar("T", Demonstration, Pair)
# Goes over rows, telling how far it is; the words say what is done.
ProgressFn = Callable[[Sequence[Any], str], Iterable[Any]]

# table -> split -> number of rows that the config expects
ExpectedRows = Mapping[str, Mapping[str, int]]
NO_EXPECTATION: ExpectedRows = {}

log = logging.getLogger(__name__)


def no_progress(rows: Sequence[Any], what: str) -> Sequence[Any]:
    return rows


class Hub:
    """`dataset.sft` and `dataset.preference`; with dataset.path the folders sft and preference below it, each laid out
    as the hub lays out a table (parquet, arrow or JSON lines), or as `DatasetDict.save_to_disk` does."""

    def __init__(self, data: DataInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> None:
        self.data, self.expected_rows = data, expected_rows
        self._validation = cache(self._pairs)  # every job of a sweep asks for it several times

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        assert self.data.sft is not None
        return self._read("sft", self.data.sft.train_split, demonstration_from, self.data.sft_size, track)

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        return self._validation(split) if split == "validation" else self._pairs(split, track)

    def prompts(self, count: int) -> list[Prompt]:
        return distinct_prompts(self.pairs("validation"), count)

    def check(self) -> None:
        """The first row of every split of a local copy; the hub's are not fetched: a plan needs no network."""
        data = self.data
        if data.path is None:
            return
        if data.sft is not None:
            self._check("sft", data.sft.train_split, demonstration_from)
            if data.sft.drop_if_rejected_elsewhere:
                self._check("sft", data.sft.train_split, pair_from)
        if data.preference is not None:
            for split in (data.preference.train_split, data.preference.validation_split):
                self._check("preference", split, pair_from)

    def _check(self, name: str, split: str, parse: Callable[[Row, str], T]) -> None:
        first: Any = next(iter(self._table(name, split, streaming=True)), None)
        if first is None:
            raise ConfigError(f"{self._location(name)}/{split}: no rows in it")
        self._parsed(name, split, first, 0, parse)

    def _pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        table = self.data.preference
        assert table is not None
        if split == "train":
            return self._read("preference", table.train_split, pair_from, self.data.train_size, track)
        return self._read("preference", table.validation_split, pair_from, self.data.validation_size, track)

    def _read(
        self, name: str, split: str, parse: Callable[[Row, str], T], size: int | None, track: ProgressFn
    ) -> list[T]:
        rows = self._table(name, split)
        kept = self._filtered_indices(name, split, rows, parse, track)
        numbers = [kept[i] for i in sample_indices(len(kept), size, self.data.seed)]
        told = track(rows.select(numbers), f"{split} rows")
        return [self._parsed(name, split, row, number, parse) for number, row in zip(numbers, told, strict=True)]

    def _filtered_indices(
        self, name: str, split: str, rows: Any, parse: Callable[[Row, str], T], track: ProgressFn
    ) -> Sequence[int]:
        """Numbers of the rows that the table's filters leave; how many is compared with what the config says."""
        settings: TableInputs = getattr(self.data, name)
        left: Sequence[int] = range(len(rows))
        if settings.drop_if_rejected_elsewhere:
            told = track(rows, f"{split} rows rejected elsewhere")
            left = _never_rejected([self._parsed(name, split, row, i, pair_from) for i, row in enumerate(told)], left)
        if settings.deduplicate:
            told = track(rows, f"{split} rows that repeat")
            left = _distinct([self._parsed(name, split, row, i, parse) for i, row in enumerate(told)], left)
        said = self.expected_rows.get(name, {}).get(split)
        if said not in (None, len(left)):
            of = f" of {len(rows)} after filtering" if len(left) < len(rows) else ""
            where = f"{self._location(name)}/{split}"
            log.warning("%s has %d rows%s; dataset.%s.rows says %d", where, len(left), of, name, said)
        return left

    def _parsed(self, name: str, split: str, row: Row, number: int, parse: Callable[[Row, str], T]) -> T:
        settings: TableInputs = getattr(self.data, name)
        where = f"{self._location(name)}/{split}, row {number}"
        return parse(adapted(row, settings.columns, settings.adapter, where), where)

    def _location(self, name: str) -> str:
        return getattr(self.data, name).path if self.data.path is None else str(Path(self.data.path.location) / name)

    def _table(self, name: str, split: str, streaming: bool = False) -> datasets.Dataset:
        """Raises ConfigError where it cannot be had."""
        import datasets

        where = self._location(name)
        key = f"dataset.{name}.path" if self.data.path is None else "dataset.path"
        try:
            if self.data.path is not None and (Path(where) / "dataset_dict.json").is_file():
                saved: Any = datasets.load_from_disk(where)
                if split not in saved:
                    raise ValueError(f"its splits are {', '.join(saved)}")
                return saved[split]
            if streaming:  # of a split that is part of others, or several, the first
                split = re.split(r"[\[+]", split)[0]
            return datasets.load_dataset(where, split=split, streaming=streaming)
        except Exception as error:  # datasets raises many kinds; all mean the table cannot be had
            reason = str(error).split("\n")[0]
            hint = "" if self.data.path is not None else "; dataset.path=FOLDER names a local copy"
            raise ConfigError(f"{key}={where} (split {split}) cannot be loaded: {reason}{hint}") from error


def _never_rejected(pairs: Sequence[Pair], places: Sequence[int]) -> list[int]:
    rejected = {(*pair.prompt.key, pair.rejected) for pair in pairs}
    return [i for i in places if (*pairs[i].prompt.key, pairs[i].chosen) not in rejected]


def _distinct(rows: Sequence[Demonstration | Pair], places: Sequence[int]) -> list[int]:
    first: dict[tuple[str, ...], int] = {}
    for i in places:
        row = rows[i]
        responses = (row.response,) if isinstance(row, Demonstration) else (row.chosen, row.rejected)
        first.setdefault((*row.prompt.key, *responses), i)
    return list(first.values())
