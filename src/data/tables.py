"""Tables of the Hugging Face hub, or local copies of them: loading, filters, and parsing of rows."""

from __future__ import annotations

import hashlib
import logging
import re
from collections.abc import Callable, Container, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from src.config.tables import MixedTable, Table
from src.data.adapters import adapt_row
from src.data.row_counts import count_rows
from src.data.row_samples import RowsOnDemand, mixed_order, rows_of_each, sample_indices
from src.data.rows import (
    Demonstration,
    Pair,
    ProgressFn,
    Prompt,
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


@dataclass(frozen=True)
class Part:
    """A split of a table; its rows are those of a whole split, or part of a mixture."""

    table: Table
    split: str
    key: str  # below `dataset`: sft, preference.tables.1
    location: str
    size: int | None  # of its rows that a mixture has at most; None: all
    is_held_out: bool  # of the rows of a table whose splits are one: those of held-out prompts, or the others

    @property
    def source(self) -> str:
        """The name of its table in results; none outside a mixture."""
        return self.table.label if isinstance(self.table, MixedTable) else ""

    @property
    def weight(self) -> float | None:
        return self.table.weight if isinstance(self.table, MixedTable) else None

    @property
    def where(self) -> str:
        return f"{self.location}/{self.split}"


class Hub(Source):
    """`dataset.sft` and `dataset.preference` on the hub, or PATH/sft and PATH/preference with dataset.path=PATH.

    A local copy is laid out as on the hub (parquet, arrow or JSON lines), or as `DatasetDict.save_to_disk` does. Those
    of a mixture are PATH/sft/NAME or PATH/preference/NAME.
    """

    def demonstrations(self, track: ProgressFn = no_progress) -> Sequence[Demonstration]:
        return self._rows("sft", parse_demonstration, self.data.sft_size, track)

    def held_out_demonstrations(self, track: ProgressFn = no_progress) -> Sequence[Demonstration]:
        size = self.data.sft_validation_size
        return self._rows("sft_validation", parse_demonstration, size, track, all_read=True)

    def pairs(self, split: str, track: ProgressFn = no_progress) -> Sequence[Pair]:
        return self._validation_pairs if split == "validation" else self._training_pairs(track)

    def _training_pairs(self, track: ProgressFn) -> Sequence[Pair]:
        return self._rows("train", parse_pair, self.data.train_size, track)

    @cached_property
    def _validation_pairs(self) -> Sequence[Pair]:  # every point of a sweep asks for them several times
        return self._rows("validation", parse_pair, self.data.validation_size, no_progress, all_read=True)

    def num_rows(self, split: str) -> list[int | None]:
        return [self._count(part) for part in self._parts(split)]

    def _count(self, part: Part) -> int | None:
        """Count the rows of a local copy, before filters. Of a part of a split (train[:97%]) nothing here tells."""
        if self.data.path is None or re.search(r"[\[+]", part.split):
            return None
        if (Path(part.location) / "dataset_dict.json").is_file():
            return len(self._table(part))
        import datasets

        builder = datasets.load_dataset_builder(part.location, cache_dir=self._cache_dir())
        return count_rows((builder.config.data_files or {}).get(part.split, ()))

    def sample(self, split: str, count: int) -> list[Sequence[Demonstration | Pair]]:
        parse: Callable[[Row, str], Demonstration | Pair]
        parse = parse_demonstration if split.startswith("sft") else parse_pair
        if self.data.path is None:
            return [[] for _ in self._parts(split)]
        return [self._parse(part, self._table(part, num_rows=count), parse) for part in self._parts(split)]

    def _parts(self, split: str) -> list[Part]:
        """Return what `sft`, `sft_validation`, `train` or `validation` is read from."""
        name, held_out = "sft" if split.startswith("sft") else "preference", split.endswith("validation")
        tables = getattr(self.data, name)
        mixed = isinstance(tables, tuple)
        parts = []
        for number, table in enumerate(tables if mixed else (tables,)):
            location = table.path
            if self.data.path is not None:
                location = str(Path(self.data.path.location, name, *([table.label] if mixed else [])))
            table_split = table.validation_split if held_out else table.train_split
            size = table.size if mixed and not held_out else None
            if table_split is not None:
                key = f"{name}.tables.{number}" if mixed else name
                parts.append(Part(table, table_split, key, location, size, held_out))
        return parts

    def check(self) -> None:
        """Parse the first row of every split of a local copy. The hub is not asked: planning needs no network."""
        data = self.data
        if data.path is None:
            return
        splits = ["train", "validation"] if data.preference is not None else []
        if data.sft is not None:
            splits += ["sft"] if data.sft_validation_size == 0 else ["sft", "sft_validation"]
        for split in splits:
            for part in self._parts(split):
                self._check(part, parse_demonstration if split.startswith("sft") else parse_pair)
                if part.table.drop_if_rejected_elsewhere:
                    self._check(part, parse_pair)
                if part.size is not None:
                    _check_size(part, self._count(part))

    def _check(self, part: Part, parse: Callable[[Row, str], Demonstration | Pair]) -> None:
        first = self._table(part, num_rows=1)
        if not first:
            which = f" with dataset.{part.key}.where={part.table.where}" if part.table.where else ""
            raise ConfigError(f"{part.where}: the split has no rows{which}")
        self._parse(part, first, parse)

    def _rows(
        self, split: str, parse: Callable[[Row, str], T], size: int | None, track: ProgressFn, all_read: bool = False
    ) -> Sequence[T]:
        """Return a sample of the rows that pass the filters, all parsed, or each on demand where few will be read."""
        with reading(self.data.path):  # rows are mapped from disk: they are read as they are parsed
            parts = self._parts(split)
            tables = [self._table(part) for part in parts]
            usable = [self._usable(*each, parse, track) for each in zip(parts, tables, strict=True)]
            available = [part.size or len(rows) for part, rows in zip(parts, usable, strict=True)]
            weights = [part.weight for part in parts]
            counts = rows_of_each(available, weights, size)
            indices = [
                [rows[i] for i in sample_indices(len(rows), count, self.data.seed)]
                for rows, count in zip(usable, counts, strict=True)
            ]
            if self.data.max_examples is not None and not all_read:
                numbered = [(number, i) for number, chosen in enumerate(indices) for i in chosen]

                def parse_one(at: tuple[int, int]) -> T:
                    number, i = at
                    return self._parse(parts[number], [(i, tables[number][i])], parse)[0]

                return RowsOnDemand(parse_one, numbered)
            parsed: list[list[T]] = []
            for part, table, chosen in zip(parts, tables, indices, strict=True):
                selected = track(table.select(chosen), f"{part.split} rows")
                parsed.append(self._parse(part, zip(chosen, selected, strict=True), parse))
            if all_read:  # evaluation takes the first prompts of them
                return [parsed[number][j] for number, j in mixed_order(counts, available, weights)]
            return [row for rows in parsed for row in rows]

    def _usable(self, part: Part, rows: Any, parse: Callable[[Row, str], T], track: ProgressFn) -> Sequence[int]:
        """Return the indices of the rows that pass the table's filters; warn when the config expects another number."""
        settings = part.table
        indices: Sequence[int] = range(len(rows))
        _check_columns(part, rows.column_names)
        for column, value in settings.where.items():
            column_values = rows[column]
            indices = [i for i in indices if column_values[i] == value]
        if settings.drop_if_rejected_elsewhere:
            tracked = track(rows, f"{part.split} rows rejected elsewhere")
            pairs = self._parse(part, enumerate(tracked), parse_pair)
            rejected = {(*pair.prompt.key, pair.rejected) for pair in pairs}
            indices = [i for i in indices if (*pairs[i].prompt.key, pairs[i].chosen) not in rejected]
        if settings.deduplicate:
            parsed = self._parse(part, enumerate(track(rows, f"{part.split} rows that repeat")), parse)
            first_with = {(*parsed[i].prompt.key, *parsed[i].responses): i for i in reversed(indices)}
            indices = sorted(first_with.values())
        expected = self.expected_rows.get(part.key, {}).get(part.split)
        if expected not in (None, len(indices)):
            total = f" of {len(rows)} after filtering" if len(indices) < len(rows) else ""
            log.warning(
                "%s has %d rows%s; dataset.%s.rows expects %d", part.where, len(indices), total, part.key, expected
            )
        if (share := settings.held_out) is not None:
            prompts = {i: self._parse(part, [(i, rows[i])], parse)[0].prompt for i in indices}
            indices = [i for i in indices if is_held_out(prompts[i], share) == part.is_held_out]
        _check_size(part, len(indices))
        return indices

    def _parse(self, part: Part, numbered_rows: Iterable[tuple[int, Row]], parse: Callable[[Row, str], T]) -> list[T]:
        parsed = []
        for number, row in numbered_rows:
            where = f"{part.where}, row {number}"
            result = parse(adapt_row(row, part.table.columns, part.table.adapter, where), where)
            if part.source:
                result = replace(result, prompt=replace(result.prompt, source=part.source))
            parsed.append(result)
        return parsed

    def _table(self, part: Part, num_rows: int | None = None) -> Any:
        """Load a split of a table, a datasets.Dataset; or a list of its first rows with their numbers, as `where` says.

        Raises ConfigError when that fails.
        """
        import datasets

        datasets.logging.set_verbosity(logging.CRITICAL)  # it prints what it raises, too
        location, split = part.location, part.split
        key = f"dataset.{part.key}.path" if self.data.path is None else "dataset.path"
        if self.data.path is not None:
            for path in sorted(Path(location).rglob("*")):
                if not path.is_dir():
                    require_regular_file(path, key)
        try:
            if self.data.path is not None and (Path(location) / "dataset_dict.json").is_file():
                saved = datasets.load_from_disk(location)
                if split not in saved:
                    raise ValueError(f"available splits: {', '.join(saved)}")
                return saved[split] if num_rows is None else list(islice(_matching(part, saved[split]), num_rows))
            if num_rows is None:
                return datasets.load_dataset(location, split=split, cache_dir=self._cache_dir())
            # Streaming cannot slice (train[:97%]) or join (a+b) splits; for the first rows this is enough.
            stream = datasets.load_dataset(location, split=re.split(r"[\[+]", split)[0], streaming=True)
            return list(islice(_matching(part, stream), num_rows))
        except ConfigError:
            raise
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


def _matching(part: Part, rows: Iterable[Row]) -> Iterator[tuple[int, Row]]:
    """Yield the rows that the table's `where` lets through, with their numbers. Raises ConfigError like `_usable`."""
    where = part.table.where
    for number, row in enumerate(rows):
        _check_columns(part, row)
        if all(row[column] == value for column, value in where.items()):
            yield number, row


def _check_columns(part: Part, columns: Container[str]) -> None:
    """Raise ConfigError for a `where` of a column that the table does not have."""
    for column in part.table.where:
        if column not in columns:
            raise ConfigError(f"dataset.{part.key}.where: {part.where} has no column {column!r}")


def _check_size(part: Part, num_rows: int | None) -> None:
    """Raise ConfigError when a mixture asks for more rows of a table than there are."""
    if part.size is not None and num_rows is not None and part.size > num_rows:
        raise ConfigError(
            f"dataset.{part.key}.size={part.size}: {part.where} has {num_rows} rows; give at most that many"
        )


def is_held_out(prompt: Prompt, share: float) -> bool:
    """Return whether the prompt is one of the held-out share, by a hash of its first user message, as in every table.

    A system message may be that of all prompts.
    """
    first = next((m for m in prompt.messages if m["role"] == "user"), prompt.messages[0])
    digest = hashlib.sha256(first["content"].strip().encode(errors="replace")).digest()
    return int.from_bytes(digest[:8], "big") < share * 2**64
