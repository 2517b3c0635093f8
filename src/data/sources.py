"""Sources of demonstrations, preference pairs and held-out prompts; `open_source` returns the one of a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property

from src.data import mini_tldr
from src.data.rows import (
    NO_EXPECTATION,
    Demonstration,
    ExpectedRows,
    Pair,
    ProgressFn,
    Prompt,
    Source,
    no_progress,
    parse_pair,
    read_rows,
    sample_indices,
    text_prompt,
)
from src.data.tables import Hub
from src.errors import ConfigError
from src.planning.content import reading
from src.planning.identity import DataInputs

MINI_TLDR_ROWS = {"sft": 6400, "train": 2000, "validation": 256}  # where the config has no size


class MiniTldr(Source):
    """Generated rows. Every list has its own seed, so a change of one size leaves the others unchanged."""

    def _seed(self, offset: int) -> int:
        return self.data.seed * 1000 + offset

    def num_rows(self, split: str) -> int:
        sizes = {"sft": self.data.sft_size, "train": self.data.train_size, "validation": self.data.validation_size}
        return sizes[split] or MINI_TLDR_ROWS[split]

    def sample(self, split: str, count: int) -> Sequence[Demonstration | Pair]:
        count = min(count, self.num_rows(split))
        return self._demonstrations(count) if split == "sft" else self._pairs(split, count)

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        return self._demonstrations(self.num_rows("sft"))

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        return self._pairs(split, self.num_rows(split))

    def _demonstrations(self, count: int) -> list[Demonstration]:
        rows = mini_tldr.demonstrations(count, self._seed(1))
        return [Demonstration(text_prompt(post.text), summary) for post, summary in rows]

    def _pairs(self, split: str, count: int) -> list[Pair]:
        rows = mini_tldr.preferences(count, self._seed(2 if split == "train" else 3))
        return [Pair(text_prompt(post.text), chosen, rejected) for post, chosen, rejected in rows]

    def prompts(self, num_prompts: int) -> list[Prompt]:
        return [text_prompt(post.text, post.facts) for post in mini_tldr.posts(num_prompts, self._seed(4))]


class JsonLines(Source):
    """One file of pairs, split by a seeded shuffle; SFT learns the chosen responses of the training pairs."""

    @cached_property
    def _splits(self) -> dict[str, list[Pair]]:
        data = self.data
        assert data.path is not None
        path = data.path.location
        with reading(data.path):
            rows = [parse_pair(row, where) for where, row in read_rows(path)]
        # Shuffled by prompt: the pairs of one prompt must not be in both splits.
        prompts = list(dict.fromkeys(row.prompt.stripped_key for row in rows))
        random.Random(data.seed).shuffle(prompts)
        position = {key: number for number, key in enumerate(prompts)}
        rows.sort(key=lambda row: position[row.prompt.stripped_key])
        end = validation_size = data.validation_size or max(2, len(rows) // 10)
        while 0 < end < len(rows) and rows[end].prompt.stripped_key == rows[end - 1].prompt.stripped_key:
            end += 1
        if end >= len(rows):
            raise ConfigError(
                f"dataset.path={path}: {len(rows)} pairs of {len(prompts)} prompts, and dataset.validation_size="
                f"{validation_size} pairs are held out; none remains to train on"
            )
        return {"validation": rows[:end], "train": rows[end:][: data.train_size]}

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        return [Demonstration(p.prompt, p.chosen, p.where) for p in self.pairs("train")[: self.data.sft_size]]

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        return self._splits[split]

    def num_rows(self, split: str) -> int:
        if split == "sft":
            return len(self.pairs("train")[: self.data.sft_size])
        return len(self.pairs(split))

    def sample(self, split: str, count: int) -> Sequence[Demonstration | Pair]:
        rows: Sequence[Demonstration | Pair] = self.demonstrations() if split == "sft" else self.pairs(split)
        return rows[:: max(1, len(rows) // count)]

    def check(self) -> None:
        self.pairs("train")


SOURCES: dict[str, type[Source]] = {"mini_tldr": MiniTldr, "jsonl": JsonLines, "hub": Hub}

_last_opened: dict[str, Source] = {}


def sample_demonstrations(source: Source, data: DataInputs, track: ProgressFn = no_progress) -> list[Demonstration]:
    """Return sft_fraction of the source's demonstrations, at least one, in the source's order.

    A smaller fraction is a subset of every larger one.
    """
    rows = source.demonstrations(track)
    num_rows = max(1, round(data.sft_fraction * len(rows)))
    return [rows[i] for i in sample_indices(len(rows), num_rows, f"{data.seed}/sft_fraction")]


def open_source(data: DataInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> Source:
    """Return the source of the rows, cached: the points that a worker computes have the same data one after another."""
    key = repr((data, expected_rows))
    if key not in _last_opened:
        _last_opened.clear()
        _last_opened[key] = SOURCES[data.source](data, expected_rows)
    return _last_opened[key]
