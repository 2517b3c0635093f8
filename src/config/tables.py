"""The part of the schema that says which tables a dataset is read from, one or a mixture. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field

from omegaconf import MISSING

from src.config.fields import added_field, choice, folder_name, number

MAX_ROWS = 10**12
MAX_TOKENS = 10**7  # of one text


@dataclass
class Table:
    """Which rows of a table of the hub are used."""

    path: str = MISSING
    train_split: str = "train"
    validation_split: str | None = "validation"  # null: none of its rows are held out
    columns: dict[str, str] = field(default_factory=dict)  # prompt, chosen, ... -> column name in the table
    adapter: str | None = choice(None, "hh", default=None)  # a key of src.data.adapters.ADAPTERS
    deduplicate: bool = False  # drop rows equal to an earlier one
    drop_if_rejected_elsewhere: bool = False  # drop rows whose chosen response another row of the prompt rejects
    where: dict[str, str] = added_field(field(default_factory=dict))  # column -> value: only rows with these
    held_out: float | None = added_field(number(None, above=0, below=1))  # of prompts, where both splits are one


@dataclass
class MixedTable(Table):
    """Which rows of a table of a mixture are used: by weights, or `size` of them, or all."""

    name: str | None = folder_name(None)  # in results, and of its folder in a local copy; null: the end of its path
    weight: float | None = number(None, above=0, maximum=1e6)  # its rows are in proportion to it
    size: int | None = number(None, minimum=1, maximum=MAX_ROWS)  # training rows

    @property
    def label(self) -> str:
        return self.name or self.path.rstrip("/").rpartition("/")[2]


@dataclass
class TableSizes:
    """What is known of a table beforehand."""

    rows: dict[str, int] = number(default_factory=dict, maximum=MAX_ROWS)  # split -> expected number of rows
    tokens: float | None = number(None, above=0, maximum=MAX_TOKENS)  # mean per row, for cost estimates
    prompt_tokens: float | None = number(None, above=0, maximum=MAX_TOKENS)  # of these, the prompt's


@dataclass
class ListedTable(TableSizes, MixedTable):
    """An entry of `tables`."""


@dataclass
class HubTable(TableSizes, Table):
    path: str = ""  # of the table; none where there are several
    tables: list[ListedTable] = field(default_factory=list)  # a mixture of these, in place of the one table
