"""Sources of demonstrations, preference pairs and held-out prompts; `open_source` returns the one of a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property, lru_cache
from typing import Any

from src.data import mini_math, mini_tldr
from src.data.row_samples import RowsOnDemand, shuffled_indices
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
    text_prompt,
)
from src.data.tables import Hub
from src.errors import ConfigError
from src.planning.content import ContentPath, reading
from src.planning.identity import DataInputs

MAX_VALIDATION_PAIRS = 256  # of a file, where the config has no size
GENERATED_ROWS = {"sft": 6400, "train": 2000, "validation": 256}  # where the config has no size


class _Generated(Source):
    """Rows that are made up. Every list has its own seed, so a change of one size leaves the others unchanged."""

    def _seed(self, offset: int) -> int:
        return self.data.seed * 1000 + offset

    def num_rows(self, split: str) -> int:
        sizes = {"sft": self.data.sft_size, "train": self.data.train_size, "validation": self.data.validation_size}
        return sizes[split] or GENERATED_ROWS[split]

    def sample(self, split: str, count: int) -> Sequence[Demonstration | Pair]:
        count = min(count, self.num_rows(split))
        return self._demonstrations(count) if split == "sft" else self._pairs(split, count)

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        return self._demonstrations(self.num_rows("sft"))

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        return self._pairs(split, self.num_rows(split))

    def _demonstrations(self, count: int) -> list[Demonstration]:
        raise NotImplementedError

    def _pairs(self, split: str, count: int) -> list[Pair]:
        raise NotImplementedError


class MiniTldr(_Generated):
    def _demonstrations(self, count: int) -> list[Demonstration]:
        rows = mini_tldr.demonstrations(count, self._seed(1))
        return [Demonstration(text_prompt(post.text), summary) for post, summary in rows]

    def _pairs(self, split: str, count: int) -> list[Pair]:
        rows = mini_tldr.preferences(count, self._seed(2 if split == "train" else 3))
        return [Pair(text_prompt(post.text, post.facts), chosen, rejected) for post, chosen, rejected in rows]

    def prompts(self, num_prompts: int) -> list[Prompt]:
        return [text_prompt(post.text, post.facts) for post in mini_tldr.posts(num_prompts, self._seed(4))]


class MiniMath(_Generated):
    def _demonstrations(self, count: int) -> list[Demonstration]:
        rows = mini_math.demonstrations(count, self._seed(1))
        return [Demonstration(_problem_prompt(problem), answer) for problem, answer in rows]

    def _pairs(self, split: str, count: int) -> list[Pair]:
        rows = mini_math.preferences(count, self._seed(2 if split == "train" else 3), split == "validation")
        return [Pair(_problem_prompt(problem), right, wrong) for problem, right, wrong in rows]

    def prompts(self, num_prompts: int) -> list[Prompt]:
        return [_problem_prompt(problem) for problem in mini_math.problems(num_prompts, self._seed(4))]


def _problem_prompt(problem: mini_math.Problem) -> Prompt:
    return text_prompt(problem.text, {"answer": str(problem.answer)})


class JsonLines(Source):
    """One file of pairs, split by a seeded shuffle; SFT learns the chosen responses of the training pairs."""

    @cached_property
    def _splits(self) -> dict[str, list[Pair]]:
        data = self.data
        assert data.path is not None
        path, rows = data.path.location, list(_read_pairs(data.path))
        # Shuffled by prompt: the pairs of one prompt must not be in both splits.
        prompts = list(dict.fromkeys(row.prompt.stripped_key for row in rows))
        random.Random(data.seed).shuffle(prompts)
        position = {key: number for number, key in enumerate(prompts)}
        rows.sort(key=lambda row: position[row.prompt.stripped_key])
        end = validation_size = data.validation_size or max(2, min(len(rows) // 10, MAX_VALIDATION_PAIRS))
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


@lru_cache(maxsize=1)  # SFT, alignment and the prompts each have a source of their own
def _read_pairs(path: ContentPath) -> list[Pair]:
    with reading(path):
        return [parse_pair(row, where) for where, row in read_rows(path.location)]


SOURCES: dict[str, type[Source]] = {"mini_tldr": MiniTldr, "mini_math": MiniMath, "jsonl": JsonLines, "hub": Hub}

_last_opened: dict[str, Source] = {}


def training_rows(source: Source, split: str, track: ProgressFn = no_progress) -> RowsOnDemand[Demonstration | Pair]:
    """Return the rows of `sft` (sft_fraction of them, at least one) or `train` that training may read.

    They are in the source's order; where only the first of them are read (max_examples), in a seeded one. A smaller
    fraction is a subset of every larger one.
    """
    data = source.data
    rows: Sequence[Any] = source.demonstrations(track) if split == "sft" else source.pairs(split, track)
    fraction = data.sft_fraction if split == "sft" else 1.0
    order = shuffled_indices(len(rows), f"{data.seed}/sft_fraction")[: max(1, round(fraction * len(rows)))]
    return RowsOnDemand(rows.__getitem__, sorted(order) if data.max_examples is None else order)


def open_source(data: DataInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> Source:
    """Return the source of the rows, cached: the points that a worker computes have the same data one after another."""
    key = repr((data, expected_rows))
    if key not in _last_opened:
        _last_opened.clear()
        _last_opened[key] = SOURCES[data.source](data, expected_rows)
    return _last_opened[key]
