"""Where demonstrations, preference pairs and prompts come from: `open_source(data)` has three lists."""

from __future__ import annotations

import random
from functools import cached_property
from typing import Protocol

from src.data import mini_tldr
from src.data.rows import (
    Demonstration,
    Pair,
    Prompt,
    distinct_prompts,
    pair_from,
    read_rows,
    sample_indices,
    text_prompt,
)
from src.data.tables import NO_EXPECTATION, ExpectedRows, Hub, ProgressFn, no_progress
from src.errors import ConfigError
from src.planning.identity import DataInputs


class Source(Protocol):
    """Each may take a while: `over` tells how far it is."""

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        """What SFT learns."""

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        """Preference pairs of `train` or `validation`."""

    def prompts(self, count: int) -> list[Prompt]:
        """The first `count` held-out prompts to sample responses for, always in the same order."""

    def check(self) -> None:
        """Read what can be read without the network. Raises ConfigError naming file and line, before anything runs."""


class MiniTldr:
    """Generated; every list has a seed of its own, so changing one size leaves the others as they were."""

    def __init__(self, data: DataInputs) -> None:
        self.data = data

    def _seed(self, part: int) -> int:
        return self.data.seed * 1000 + part

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        rows = mini_tldr.demonstrations(self.data.sft_size or 6400, self._seed(1))
        return [Demonstration(text_prompt(post.text), summary) for post, summary in rows]

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        size, part = (self.data.train_size or 2000, 2) if split == "train" else (self.data.validation_size or 256, 3)
        return [
            Pair(text_prompt(p.text), chosen, rejected)
            for p, chosen, rejected in mini_tldr.preferences(size, self._seed(part))
        ]

    def prompts(self, count: int) -> list[Prompt]:
        return [text_prompt(post.text, post.facts) for post in mini_tldr.posts(count, self._seed(4))]

    def check(self) -> None:
        pass


class JsonLines:
    """One file of pairs, split by a seeded shuffle; SFT learns the chosen responses of the training pairs."""

    def __init__(self, data: DataInputs) -> None:
        self.data = data

    @cached_property
    def _splits(self) -> dict[str, list[Pair]]:
        data = self.data
        assert data.path is not None
        path = data.path.location
        rows = [pair_from(row, where) for where, row in read_rows(path)]
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
                f"dataset.path={path}: {len(rows)} pairs of {len(order)} prompts, of which {wanted} pairs "
                "(dataset.validation_size) are held out; none is left to train on"
            )
        return {"validation": rows[:held], "train": rows[held:][: data.train_size]}

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        return [Demonstration(p.prompt, p.chosen) for p in self.pairs("train")[: self.data.sft_size]]

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        return self._splits[split]

    def prompts(self, count: int) -> list[Prompt]:
        return distinct_prompts(self.pairs("validation"), count)

    def check(self) -> None:
        self.pairs("train")


SOURCES: dict[str, type[MiniTldr] | type[JsonLines] | type[Hub]] = {
    "mini_tldr": MiniTldr,
    "jsonl": JsonLines,
    "hub": Hub,
}


_open: dict[str, Source] = {}


def sample_demonstrations(source: Source, data: DataInputs, track: ProgressFn = no_progress) -> list[Demonstration]:
    """Return sft_fraction of the source's demonstrations, at least one, in the source's order.

    A smaller fraction is a subset of every larger one.
    """
    rows = source.demonstrations(track)
    count = max(1, round(data.sft_fraction * len(rows)))
    return [rows[i] for i in sample_indices(len(rows), count, f"{data.seed}/sft_fraction")]


def open_source(data: DataInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> Source:
    """Return the source of the rows, kept while a worker meets the same data in every point of a sweep."""
    key = repr(data)
    if key not in _open:
        _open.clear()
        source = SOURCES[data.source]
        _open[key] = source(data, expected_rows) if source is Hub else source(data)
    return _open[key]
