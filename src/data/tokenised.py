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

from src.config import ConfigError, Point
from src.data import demonstrations_of, source_of
from src.data.rows import Demonstration, Pair
from src.data.tables import silently
from src.data.templates import Template
from src.identity import digest
from src.pairs import Example
from src.plan import tokens_depend_on
from src.store import Attempt, Store

log = logging.getLogger(__name__)

VERSION = 1  # raise it when rows become other tokens: kept ones are then not these any more

_COLUMNS = {"tokens": "i", "ends": "q", "pieces": "q", "given": "i", "spans": "q"}


class Examples(Sequence[Example]):
    """Kept flat, four bytes a token: a table of many million tokens would take ten times that as Python's numbers.

    tokens: prompt and responses of each; ends: of each of these pieces in tokens; pieces: of each example's in ends;
    given: Example.given, flat; spans: end of each example's in given. The ends begin with 0.
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
class Tokenised:
    examples: Examples = field(default_factory=Examples)
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows

    def add(self, prompt: list[int], responses: list[list[int]], given: Iterable[int] = ()) -> None:
        """A row, unless there is nothing in it to learn."""
        if prompt and all(responses):
            self.examples.append(prompt, responses, given)
        else:
            reason = "no supervised token" if prompt else "empty prompt"
            self.dropped[reason] = self.dropped.get(reason, 0) + 1


def tokenise_pairs(rows: Iterable[Pair], template: Template, max_tokens: int, max_prompt_tokens: int) -> Tokenised:
    """Over-long prompts keep their end, over-long responses are cut on the right (losing their end token); a row
    whose response is empty, or that has no prompt token to predict from, is dropped and counted."""
    made = Tokenised()
    for row in rows:
        prompt = template.prompt_ids(row.prompt)[-max_prompt_tokens:]
        room = max_tokens - len(prompt)
        texts = (row.chosen, row.rejected)
        made.add(prompt, [template.response_ids(text)[:room] if text.strip() else [] for text in texts])
    return made


def tokenise_demonstrations(
    rows: Iterable[Demonstration], template: Template, max_tokens: int, max_prompt_tokens: int
) -> Tokenised:
    """The same of single responses; in a conversation every answer is learned, each with its end token."""
    made = Tokenised()
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
        made.add(prompt, [response], given)
    return made


_cache: dict[str, Tokenised] = {}


def examples_of(point: Point, part: str, template: Template, attempt: Attempt | None = None) -> Tokenised:
    """The tokenised `sft` demonstrations, or the `train` or `validation` pairs, kept on disk for all who read the same,
    and for the process. attempt: told how far it is. Raises ConfigError when no row is left."""
    data = point.dataset
    key = digest({"part": part, "template": point.model.template, **tokens_depend_on(point), "version": VERSION})
    if key not in _cache:
        if len(_cache) >= 6:
            _cache.clear()
        file = Store(point.output_dir).tokenised(key)
        made = _read(file)
        if made is None:
            made = _tokenised(point, part, template, attempt)
            _keep(made, file)
        total = len(made.examples) + sum(made.dropped.values())
        for reason, count in made.dropped.items():
            log.warning("%s %s: dropped %d of %d rows: %s", data.name, part, count, total, reason)
        if not made.examples:
            raise ConfigError(f"dataset={data.name}: no {part} row is left after tokenisation ({made.dropped})")
        _cache[key] = made
    return _cache[key]


def _tokenised(point: Point, part: str, template: Template, attempt: Attempt | None) -> Tokenised:
    over = silently if attempt is None else attempt.over
    limits = point.dataset.max_tokens, point.dataset.max_prompt_tokens
    if part == "sft":
        rows = demonstrations_of(point, over)
        return tokenise_demonstrations(over(rows, "tokens of demonstrations"), template, *limits)
    pairs = source_of(point).pairs(part, over)
    return tokenise_pairs(over(pairs, f"tokens of {part} pairs"), template, *limits)


def _keep(made: Tokenised, file: Path) -> None:
    """Whole or not at all; of several processes that keep the same, any one's will do."""
    import numpy as np
    from safetensors.numpy import save_file

    columns = {name: np.asarray(column) for name, column in made.examples.columns.items()}
    file.parent.mkdir(parents=True, exist_ok=True)
    draft = file.with_name(f".{os.uname().nodename}-{os.getpid()}-{file.name}")
    try:
        save_file(columns, draft, metadata={"dropped": json.dumps(made.dropped)})
        draft.replace(file)
    finally:
        draft.unlink(missing_ok=True)


def _read(file: Path) -> Tokenised | None:
    """None where there is none, or none that can be read."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(file, "np") as opened:
            columns = {name: opened.get_tensor(name) for name in _COLUMNS}
            return Tokenised(Examples(columns), json.loads(opened.metadata()["dropped"]))
    except (FileNotFoundError, SafetensorError):
        return None
