"""Where demonstrations, preference pairs and prompts come from. `source_of(point)` is the seam: three lists."""

from __future__ import annotations

import random
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol, TypeVar

from src.config import ConfigError, Dataset, HubTable, Point
from src.data import mini_tldr
from src.data.rows import Demonstration, Pair, Prompt, demonstration_from, pair_from, read_rows, text_prompt

T = TypeVar("T")


class Source(Protocol):
    def demonstrations(self) -> list[Demonstration]:
        """What SFT learns."""

    def pairs(self, split: str) -> list[Pair]:
        """Preference pairs of `train` or `validation`."""

    def prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts to sample responses for, always in the same order."""


class MiniTldr:
    """Generated; every list has a seed of its own, so changing one size leaves the others as they were."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def _seed(self, part: int) -> int:
        return self.data.seed * 1000 + part

    def demonstrations(self) -> list[Demonstration]:
        rows = mini_tldr.demonstrations(self.data.sft_size or 6400, self._seed(1))
        return [Demonstration(text_prompt(post.text), summary) for post, summary in rows]

    def pairs(self, split: str) -> list[Pair]:
        size, part = (self.data.train_size or 2000, 2) if split == "train" else (self.data.validation_size or 256, 3)
        return [
            Pair(text_prompt(p.text), chosen, rejected)
            for p, chosen, rejected in mini_tldr.preferences(size, self._seed(part))
        ]

    def prompts(self, count: int) -> list[Prompt]:
        return [text_prompt(post.text, post.facts) for post in mini_tldr.posts(count, self._seed(4))]


class JsonLines:
    """One file of pairs, split by a seeded shuffle; SFT learns the chosen responses of the training pairs."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    @cached_property
    def _splits(self) -> dict[str, list[Pair]]:
        data = self.data
        assert data.path is not None
        rows = [pair_from(row, where) for where, row in read_rows(data.path)]
        # By prompt: several pairs of one prompt would otherwise be trained on and held out at once.
        order = list(dict.fromkeys(row.prompt.key for row in rows))
        random.Random(data.seed).shuffle(order)
        place = {key: number for number, key in enumerate(order)}
        rows.sort(key=lambda row: place[row.prompt.key])
        wanted = data.validation_size or max(2, len(rows) // 10)
        held = wanted
        while 0 < held < len(rows) and rows[held].prompt == rows[held - 1].prompt:
            held += 1
        if held >= len(rows):
            raise ConfigError(
                f"dataset.path={data.path}: {len(rows)} pairs of {len(order)} prompts, of which {wanted} pairs "
                "(dataset.validation_size) are held out; none is left to train on"
            )
        return {"validation": rows[:held], "train": rows[held:][: data.train_size]}

    def demonstrations(self) -> list[Demonstration]:
        return [Demonstration(p.prompt, p.chosen) for p in self.pairs("train")[: self.data.sft_size]]

    def pairs(self, split: str) -> list[Pair]:
        return self._splits[split]

    def prompts(self, count: int) -> list[Prompt]:
        return _distinct(self.pairs("validation"), count)


class Hub:
    """Tables of the Hugging Face hub, or local copies of them under dataset.path."""

    def __init__(self, data: Dataset) -> None:
        self.data = data

    def _rows(self, name: str, table: HubTable, split: str) -> list[tuple[str, dict[str, Any]]]:
        from datasets import load_dataset

        where = table.path if self.data.path is None else str(Path(self.data.path) / name)
        try:
            rows = load_dataset(where, split=split)
        except Exception as error:  # datasets raises many kinds; all mean the table cannot be had
            reason = str(error).split("\n")[0]
            raise ConfigError(f"dataset.{name}.path={where} (split {split}) cannot be loaded: {reason}") from error
        return [(f"{where}/{split}, row {i}", row) for i, row in enumerate(rows)]

    def demonstrations(self) -> list[Demonstration]:
        assert self.data.sft is not None
        rows = self._rows("sft", self.data.sft, self.data.sft.train_split)
        return [demonstration_from(row, where) for where, row in self._chosen(rows, self.data.sft_size)]

    def pairs(self, split: str) -> list[Pair]:
        table = self.data.preference
        assert table is not None
        name, size = (
            (table.train_split, self.data.train_size)
            if split == "train"
            else (table.validation_split, self.data.validation_size)
        )
        return [pair_from(row, where) for where, row in self._chosen(self._rows("preference", table, name), size)]

    def _chosen(self, rows: list[T], size: int | None) -> list[T]:
        return _first(rows, len(rows) if size is None else size, self.data.seed)

    def prompts(self, count: int) -> list[Prompt]:
        return _distinct(self.pairs("validation"), count)


def _distinct(pairs: list[Pair], count: int) -> list[Prompt]:
    """Prompts in order of first appearance: one prompt may have several pairs."""
    found: dict[tuple[str, ...], Prompt] = {}
    for pair in pairs:
        found.setdefault(pair.prompt.key, pair.prompt)
    return list(found.values())[:count]


_SOURCES: dict[str, type[MiniTldr] | type[JsonLines] | type[Hub]] = {
    "mini_tldr": MiniTldr,
    "jsonl": JsonLines,
    "hub": Hub,
}


_loaded: dict[str, Source] = {}


def demonstrations_of(point: Point) -> list[Demonstration]:
    """What SFT learns: dataset.sft_fraction of the source's, at least one, in the source's order. A smaller share is
    part of every larger one."""
    rows = source_of(point).demonstrations()
    count = max(1, round(point.dataset.sft_fraction * len(rows)))
    return _first(rows, count, f"{point.dataset.seed}/sft_fraction")


def _first(rows: list[T], count: int, seed: int | str) -> list[T]:
    """The first `count` in a shuffled order, in their own order: a smaller choice is part of every larger one."""
    order = list(range(len(rows)))
    random.Random(seed).shuffle(order)
    return [rows[i] for i in sorted(order[:count])]


def source_of(point: Point) -> Source:
    """The point's data, kept while a worker meets the same data in every point of a sweep."""
    key = repr(point.dataset)
    if key not in _loaded:
        _loaded.clear()
        _loaded[key] = _SOURCES[point.dataset.source](point.dataset)
    return _loaded[key]
