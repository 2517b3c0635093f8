"""Tables of the Hugging Face hub, or local copies of them: loading, filters, and parsing of rows."""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from src.config.schema import Table
from src.data.adapters import adapt_row
from src.data.row_counts import count_rows
from src.data.row_samples import RowsOnDemand, sample_indices
from src.data.rows import (
    Demonstration,
    Pair,
    ProgressFn,
    Row,
    Source,
    no_progress,
    parse_demonstration,
    parse_pair,
    require_regular_file,
)
from src.errors import ConfigError
from src.planning.content import reading

T = TypeVar("T", bound=Demonstration | Pair)

log = logging.getLogger(__name__)


class Hub(Source):
    """`dataset.sft` and `dataset.preference` on the hub, or PATH/sft and PATH/preference with dataset.path=PATH.

    A local copy is laid out as on the hub (parquet, arrow or JSON lines), or as `DatasetDict.save_to_disk` does.
    """

    def demonstrations(self, track: ProgressFn = no_progress) -> Sequence[Demonstration]:
        assert self.data.sft is not None
        return self._rows("sft", self.data.sft.train_split, parse_demonstration, self.data.sft_size, track)

    def pairs(self, split: str, track: ProgressFn = no_progress) -> Sequence[Pair]:
        if split == "validation":
            return self._validation_pairs
        assert self.data.preference is not None
        return self._rows("preference", self.data.preference.train_split, parse_pair, self.data.train_size, track)

    @cached_property
    def _validation_pairs(self) -> Sequence[Pair]:  # every point of a sweep asks for them several times
        data = self.data
        assert data.preference is not None
        split, size = data.preference.validation_split, data.validation_size
        return self._rows("preference", split, parse_pair, size, no_progress, all_read=True)

    def num_rows(self, split: str) -> int | None:
        """Count the rows of a local copy, before filters. Of a part of a split (train[:97%]) nothing here tells."""
        name, split = self._split(split)
        if self.data.path is None or re.search(r"[\[+]", split):
            return None
        location = Path(self._location(name))
        if (location / "dataset_dict.json").is_file():
            return len(self._table(name, split))
        import datasets

        builder = datasets.load_dataset_builder(str(location), cache_dir=self._cache_dir())
        return count_rows((builder.config.data_files or {}).get(split, ()))

    def sample(self, split: str, count: int) -> Sequence[Demonstration | Pair]:
        if self.data.path is None:
            return []
        name, table_split = self._split(split)
        rows = enumerate(self._table(name, table_split, num_rows=count))
        parse: Callable[[Row, str], Demonstration | Pair] = parse_demonstration if split == "sft" else parse_pair
        return self._parse(name, table_split, rows, parse)

    def _split(self, split: str) -> tuple[str, str]:
        """Return the name of the table, and what it calls `sft`, `train` or `validation`."""
        name = "sft" if split == "sft" else "preference"
        table = getattr(self.data, name)
        return name, table.validation_split if split == "validation" else table.train_split

    def check(self) -> None:
        """Parse the first row of every split of a local copy. The hub is not asked: planning needs no network."""
        data = self.data
        if data.path is None:
            return
        if data.sft is not None:
            self._check("sft", data.sft.train_split, parse_demonstration)
            if data.sft.drop_if_rejected_elsewhere:
                self._check("sft", data.sft.train_split, parse_pair)
        if data.preference is not None:
            for split in (data.preference.train_split, data.preference.validation_split):
                self._check("preference", split, parse_pair)

    def _check(self, name: str, split: str, parse: Callable[[Row, str], T]) -> None:
        first: Any = next(iter(self._table(name, split, num_rows=1)), None)
        if first is None:
            raise ConfigError(f"{self._location(name)}/{split}: the split has no rows")
        self._parse(name, split, [(0, first)], parse)

    def _rows(
        self,
        name: str,
        split: str,
        parse: Callable[[Row, str], T],
        size: int | None,
        track: ProgressFn,
        all_read: bool = False,
    ) -> Sequence[T]:
        """Return a sample of the rows that pass the filters, all parsed, or each on demand where few will be read."""
        with reading(self.data.path):  # rows are mapped from disk: they are read as they are parsed
            rows = self._table(name, split)
            remaining = self._filtered_indices(name, split, rows, parse, track)
            indices = [remaining[i] for i in sample_indices(len(remaining), size, self.data.seed)]
            if self.data.max_examples is not None and not all_read:
                return RowsOnDemand(lambda i: self._parse(name, split, [(i, rows[i])], parse)[0], indices)
            selected = track(rows.select(indices), f"{split} rows")
            return self._parse(name, split, zip(indices, selected, strict=True), parse)

    def _filtered_indices(
        self, name: str, split: str, rows: Any, parse: Callable[[Row, str], T], track: ProgressFn
    ) -> Sequence[int]:
        """Return the indices of the rows that pass the table's filters; warn when the config expects another number."""
        settings: Table = getattr(self.data, name)
        indices: Sequence[int] = range(len(rows))
        if settings.drop_if_rejected_elsewhere:
            tracked = track(rows, f"{split} rows rejected elsewhere")
            pairs = self._parse(name, split, enumerate(tracked), parse_pair)
            rejected = {(*pair.prompt.key, pair.rejected) for pair in pairs}
            indices = [i for i in indices if (*pairs[i].prompt.key, pairs[i].chosen) not in rejected]
        if settings.deduplicate:
            parsed = self._parse(name, split, enumerate(track(rows, f"{split} rows that repeat")), parse)
            first_with = {(*parsed[i].prompt.key, *parsed[i].responses): i for i in reversed(indices)}
            indices = sorted(first_with.values())
        expected = self.expected_rows.get(name, {}).get(split)
        if expected not in (None, len(indices)):
            total = f" of {len(rows)} after filtering" if len(indices) < len(rows) else ""
            where = f"{self._location(name)}/{split}"
            log.warning("%s has %d rows%s; dataset.%s.rows expects %d", where, len(indices), total, name, expected)
        return indices

    def _parse(
        self, name: str, split: str, numbered_rows: Iterable[tuple[int, Row]], parse: Callable[[Row, str], T]
    ) -> list[T]:
        settings: Table = getattr(self.data, name)
        parsed = []
        for number, row in numbered_rows:
            where = f"{self._location(name)}/{split}, row {number}"
            parsed.append(parse(adapt_row(row, settings.columns, settings.adapter, where), where))
        return parsed

    def _location(self, name: str) -> str:
        return getattr(self.data, name).path if self.data.path is None else str(Path(self.data.path.location) / name)

    def _table(self, name: str, split: str, num_rows: int | None = None) -> Any:
        """Load a split of a table, a datasets.Dataset, or a list of first rows. Raises ConfigError when that fails."""
        import datasets

        datasets.logging.set_verbosity(logging.CRITICAL)  # it prints what it raises, too
        location = self._location(name)
        key = f"dataset.{name}.path" if self.data.path is None else "dataset.path"
        if self.data.path is not None:
            for path in sorted(Path(location).rglob("*")):
                if not path.is_dir():
                    require_regular_file(path, key)
        try:
            if self.data.path is not None and (Path(location) / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(location)
                if split not in saved:
                    raise ValueError(f"available splits: {', '.join(saved)}")
                return saved[split] if num_rows is None else list(islice(saved[split], num_rows))
            if num_rows is None:
                return datasets.load_dataset(location, split=split, cache_dir=self._cache_dir())
            # Streaming cannot slice (train[:97%]) or join (a+b) splits; for the first rows this is enough.
            stream = datasets.load_dataset(location, split=re.split(r"[\[+]", split)[0], streaming=True)
            return list(stream.take(num_rows))
        except Exception as error:  # datasets raises many kinds; all mean that the table cannot be loaded
            reason = str(error).split("\n")[0] or type(error).__name__
            # What datasets raises for empty JSON lines, and Arrow for an empty Parquet file.
            if isinstance(error, StopIteration) or reason.startswith("BatchSize must be greater than 0"):
                reason = "a file has no rows"
            hint = "" if self.data.path is not None else "; dataset.path=FOLDER names a local copy"
            raise ConfigError(f"{key}={location} (split {split}) cannot be loaded: {reason}{hint}") from error

    def _cache_dir(self) -> str | None:
        """Return where the package keeps its conversion of a local table: by content, as it goes by path and mtime."""
        import datasets

        path = self.data.path
        return None if path is None else str(Path(datasets.config.HF_DATASETS_CACHE) / path.fingerprint)
