"""Rows -> token ids: truncated, counted where dropped, and kept for every stage that reads the same ones."""

from __future__ import annotations

import json
import logging
import os
from array import array
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any, overload

from src.data.examples import Example
from src.data.rows import Demonstration, Pair
from src.data.sources import Source, open_source, sample_demonstrations
from src.data.tables import ExpectedRows, ProgressFn
from src.data.templates import Template
from src.errors import ConfigError
from src.planning.identity import DataInputs, ModelInputs, digest, hashable
from src.store.attempt import Attempt
from src.store.store import Store

log = logging.getLogger(__name__)

VERSION = 1  # raise it when rows become other tokens: kept ones are then not these any more

_COLUMNS = {"tokens": "i", "ends": "q", "pieces": "q", "given": "i", "spans": "q"}


class Examples(Sequence[Example]):
    """Kept flat, four bytes a token: a table of many million tokens would take ten times that as Python's numbers.

    tokens: prompt and responses of each; ends: of each of these pieces in tokens; pieces: of each example's in ends;
    given: Example.unsupervised_spans, flat; spans: end of each example's in given. The ends begin with 0.
    """

    def __init__(self, columns: dict[str, Any] | None = None) -> None:
        self.columns = columns or {
            name: array(kind, [0] if name in ("ends", "pieces", "spans") else []) for name, kind in _COLUMNS.items()
        }

    def append(self, prompt: Sequence[int], responses: Sequence[Sequence[int]], given: Iterable[int] = ()) -> None:
        columns = self.columns
        for piece in (prompt, *responses):
            columns["tokens"].extend(piece)
            columns["ends"].append(len(columns["tokens"]))
        columns["given"].extend(given)
        columns["pieces"].append(len(columns["ends"]) - 1)
        columns["spans"].append(len(columns["given"]))

    def __len__(self) -> int:
        return len(self.columns["pieces"]) - 1

    @overload
    def __getitem__(self, index: int) -> Example: ...

    @overload
    def __getitem__(self, index: slice) -> list[Example]: ...

    def __getitem__(self, index: int | slice) -> Example | list[Example]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        columns = self.columns
        first, last = columns["pieces"][index : index + 2].tolist()
        edges = columns["ends"][first : last + 1].tolist()
        prompt, *responses = (tuple(columns["tokens"][a:b].tolist()) for a, b in pairwise(edges))
        first, last = columns["spans"][index : index + 2].tolist()
        given = columns["given"][first:last].tolist()
        return Example(prompt, tuple(responses), tuple(zip(given[::2], given[1::2], strict=True)))


@dataclass
class TokenizedDataset:
    examples: Examples = field(default_factory=Examples)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def add(self, prompt: list[int], responses: list[list[int]], given: Iterable[int] = ()) -> None:
        """A row, unless there is nothing in it to learn."""
        if prompt and all(responses):
            self.examples.append(prompt, responses, given)
        else:
            reason = "no supervised token" if prompt else "empty prompt"
            self.dropped[reason] = self.dropped.get(reason, 0) + 1


def tokenize_pairs(
    rows: Iterable[Pair], template: Template, max_tokens: int, max_prompt_tokens: int
) -> TokenizedDataset:
    """ProgressFn-long prompts keep their end, over-long responses are cut on the right (losing their end token); a row
    whose response is empty, or that has no prompt token to predict from, is dropped and counted."""
    dataset = TokenizedDataset()
    for row in rows:
        prompt = template.prompt_ids(row.prompt)[-max_prompt_tokens:]
        room = max_tokens - len(prompt)
        texts = (row.chosen, row.rejected)
        dataset.add(prompt, [template.response_ids(text)[:room] if text.strip() else [] for text in texts])
    return dataset


def tokenize_demonstrations(
    rows: Iterable[Demonstration], template: Template, max_tokens: int, max_prompt_tokens: int
) -> TokenizedDataset:
    """The same of single responses; in a conversation every answer is learned, each with its end token."""
    dataset = TokenizedDataset()
    for row in rows:
        beginning, turns = template.turns(row.prompt)
        prompt = beginning[-max_prompt_tokens:]
        response: list[int] = []
        given: list[int] = []
        for answer, between in turns:
            given += [len(response) + len(answer), len(response) + len(answer) + len(between)]
            response += answer + between
        response = response + template.response_ids(row.response) if row.response.strip() else []
        response = response[: max_tokens - len(prompt)]
        while given and given[-1] >= len(response):  # cut within the user's words, or before them
            response = response[: given[-2]]
            del given[-2:]
        dataset.add(prompt, [response], given)
    return dataset


_cache: dict[str, TokenizedDataset] = {}


def load_examples(
    data: DataInputs,
    model: ModelInputs,
    split: str,
    template: Template,
    attempt: Attempt,
    expected_rows: ExpectedRows,
) -> TokenizedDataset:
    """Return the tokenized `sft` demonstrations, or the `train` or `validation` pairs.

    Tokens are kept on disk for every stage that reads the same rows, and in the process. Raises ConfigError when no row
    is left.
    """
    key = digest([VERSION, split, hashable(data), model.path.fingerprint, model.template])
    if key not in _cache:
        if len(_cache) >= 6:
            _cache.clear()
        file = Store(attempt.output_dir).tokenized(key)
        dataset = _read(file)
        if dataset is None:
            dataset = _tokenize(open_source(data, expected_rows), data, split, template, attempt.track)
            _keep(dataset, file)
        total = len(dataset.examples) + sum(dataset.dropped.values())
        for reason, count in dataset.dropped.items():
            log.warning("%s %s: dropped %d of %d rows: %s", data.source, split, count, total, reason)
        if not dataset.examples:
            raise ConfigError(f"dataset: no {split} row is left after tokenization ({dataset.dropped})")
        _cache[key] = dataset
    return _cache[key]


def _tokenize(source: Source, data: DataInputs, split: str, template: Template, track: ProgressFn) -> TokenizedDataset:
    limits = data.max_tokens, data.max_prompt_tokens
    if split == "sft":
        rows = sample_demonstrations(source, data, track)
        return tokenize_demonstrations(track(rows, "tokens of demonstrations"), template, *limits)
    pairs = source.pairs(split, track)
    return tokenize_pairs(track(pairs, f"tokens of {split} pairs"), template, *limits)


def _keep(dataset: TokenizedDataset, file: Path) -> None:
    """Whole or not at all; of several processes that keep the same, any one's will do."""
    import numpy as np
    from safetensors.numpy import save_file

    columns = {name: np.asarray(column) for name, column in dataset.examples.columns.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.uname().nodename}-{os.getpid()}-{file.name}")
    try:
        save_file(columns, draft, metadata={"dropped": json.dumps(dataset.dropped)})
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _read(file: Path) -> TokenizedDataset | None:
    """None where there is none, or none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            columns = {name: opened.get_tensor(name) for name in _COLUMNS}
            return TokenizedDataset(Examples(columns), json.loads(opened.metadata()["dropped"]))
    except (FileNotFoundError, SafetensorError):
        return None
