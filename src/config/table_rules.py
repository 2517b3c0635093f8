"""Rules for the tables that a dataset is read from, one or a mixture. No torch."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import replace

from src.config.paths import is_dir
from src.config.schema import Dataset
from src.config.tables import HubTable, ListedTable
from src.errors import ConfigError


def check_tables(data: Dataset) -> None:
    """Raise ConfigError for tables without a path or held-out rows, mixtures that do not say one thing, no folder."""
    for name in ("sft", "preference"):
        tables = data.tables(name)
        for key, table in tables:
            if not table.path:
                raise ConfigError(f"dataset.{key}.path has no value: add dataset.{key}.path=VALUE")
            if (table.held_out is None) == (table.validation_split == table.train_split):
                why = "both splits are one: set" if table.held_out is None else "its splits are two: remove"
                raise ConfigError(f"dataset.{key}.validation_split={table.validation_split}: {why} {key}.held_out")
        listed = [table for _, table in tables if isinstance(table, ListedTable)]
        if listed:
            _check_alone(f"dataset.{name}", getattr(data, name))
            _check_mixture(f"dataset.{name}", listed)
        is_validated = name == "preference" or data.sft_validation_size != 0
        if is_validated and all(table.validation_split is None for _, table in tables):
            hint = "" if name == "preference" else ", or dataset.sft_validation_size=0"
            raise ConfigError(f"dataset.{tables[0][0]}.validation_split=null: rows are held out of no table{hint}")
        for folder in [f"{name}/{table.label}" for table in listed] or [name]:
            if data.path is not None and not is_dir("dataset.path", data.path, folder):
                layout = "each a folder of every table of its mixture" if listed else "the folders sft and preference"
                raise ConfigError(f"dataset.path={data.path}: missing folder {folder}; a local copy has {layout}")


def _check_alone(key: str, table: HubTable) -> None:
    """Raise ConfigError for keys beside `tables`, which nothing would read."""
    none = HubTable()
    beside = [name for name, value in vars(replace(table, tables=[])).items() if value != getattr(none, name)]
    if beside:
        raise ConfigError(
            f"{key}.{beside[0]}: beside {key}.tables, whose entries have these keys, nothing reads it: set "
            f"{key}.tables.0.{beside[0]}, or begin with dataset=ultrafeedback_hh, which has tables alone"
        )


def _check_mixture(key: str, tables: Sequence[ListedTable]) -> None:
    for number, table in enumerate(tables):
        if (table.weight is None) != (tables[0].weight is None):
            raise ConfigError(
                f"{key}.tables.{number}.weight: give every table of a mixture a weight, or none (then all rows count)"
            )
        expected = table.rows.get(table.train_split)
        if table.size is not None and expected is not None and table.size > expected:
            raise ConfigError(f"{key}.tables.{number}.size={table.size}: the table has {expected} rows, by its `rows`")
    for text, number in Counter((table.path, table.train_split) for table in tables).items():
        if number > 1:
            raise ConfigError(f"{key}.tables: has {text[0]} (split {text[1]}) {number} times; list a table once")
    for label, number in Counter(table.label for table in tables).items():
        if number > 1:
            raise ConfigError(
                f"{key}.tables: {number} tables are called {label}: give each a name of its own, name=NAME"
            )
