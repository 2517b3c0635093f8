"""Sources of demonstrations, preference pairs and held-out prompts; `open_source` returns the one of a run."""

from __future__ import annotations

import random
from collections.abc import Sequence
from functools import cached_property, lru_cache

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
GENERATED_ROWS = {"sft": 6400, "train": 2000, "validation": 256, "sft_validation": 256}  # where the config has no size


class _Generated(Source):
    """Rows that are made up. Every list has its own seed, so a change of one size leaves the others unchanged."""

    def _seed(self, offset: int) -> int:
        return self.data.seed * 1000 + offset

    def num_rows(self, split: str) -> list[int | None]:
        return [self._size(split)]

    def sample(self, split: str, count: int) -> list[Sequence[Demonstration | Pair]]:
        count = min(count, self._size(split))
        return [self._demonstrations(split, count) if split.startswith("sft") else self._pairs(split, count)]

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        return self._demonstrations("sft", self._size("sft"))

    def held_out_demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        return self._demonstrations("sft_validation", self._size("sft_validation"))

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        return self._pairs(split, self._size(split))

    def _size(self, split: str) -> int:
        return getattr(self.data, f"{split}_size") or GENERATED_ROWS[split]

    def _demonstrations(self, split: str, count: int) -> list[Demonstration]:
        raise NotImplementedError

    def _pairs(self, split: str, count: int) -> list[Pair]:
        raise NotImplementedError


class MiniTldr(_Generated):
    def _demonstrations(self, split: str, count: int) -> list[Demonstration]:
        rows = mini_tldr.demonstrations(count, self._seed(1 if split == "sft" else 5))
        return [Demonstration(text_prompt(post.text), summary) for post, summary in rows]

    def _pairs(self, split: str, count: int) -> list[Pair]:
        rows = mini_tldr.preferences(count, self._seed(2 if split == "train" else 3))
        return [Pair(text_prompt(post.text, post.facts), chosen, rejected) for post, chosen, rejected in rows]

    def prompts(self, num_prompts: int) -> list[Prompt]:
        return [text_prompt(post.text, post.facts) for post in mini_tldr.posts(num_prompts, self._seed(4))]


class MiniMath(_Generated):
    def _demonstrations(self, split: str, count: int) -> list[Demonstration]:
        held_out = split == "sft_validation"
        rows = mini_math.demonstrations(count, self._seed(5 if held_out else 1), held_out=held_out)
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

    def held_out_demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        held_out = self.pairs("validation")[: self.data.sft_validation_size]
        return [Demonstration(p.prompt, p.chosen, p.where) for p in held_out]

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        return self._splits[split]

    def num_rows(self, split: str) -> list[int | None]:
        return [len(rows_of(self, split))]

    def sample(self, split: str, count: int) -> list[Sequence[Demonstration | Pair]]:
        rows = rows_of(self, split)
        return [rows[:: max(1, len(rows) // count)]]

    def check(self) -> None:
        self.pairs("train")


@lru_cache(maxsize=1)  # SFT, alignment and the prompts each have a source of their own
def _read_pairs(path: ContentPath) -> list[Pair]:
    with reading(path):
        return [parse_pair(row, where) for where, row in read_rows(path.location)]


SOURCES: dict[str, type[Source]] = {"mini_tldr": MiniTldr, "mini_math": MiniMath, "jsonl": JsonLines, "hub": Hub}

_last_opened: dict[str, Source] = {}


def rows_of(source: Source, split: str, track: ProgressFn = no_progress) -> Sequence[Demonstration | Pair]:
    """Return the rows of `sft`, `sft_validation`, `train` or `validation`, in the source's order."""
    match split:
        case "sft":
            return source.demonstrations(track)
        case "sft_validation":
            return source.held_out_demonstrations(track)
    return source.pairs(split, track)


def training_rows(source: Source, split: str, track: ProgressFn = no_progress) -> RowsOnDemand[Demonstration | Pair]:
    """Return the rows of `sft` (sft_fraction of them, at least one) or `train` that training may read.

    They are in the source's order; where only the first of them are read (max_examples), in a seeded one. A smaller
    fraction is a subset of every larger one.
    """
    data = source.data
    rows = rows_of(source, split, track)
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
