"""Prompts and responses -> Examples within the length limits, with what had to be dropped and why."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field

from src.config import ConfigError, Point
from src.data import demonstrations_of, source_of
from src.data.rows import Prompt
from src.data.templates import Template
from src.pairs import Example

log = logging.getLogger(__name__)


@dataclass
class Tokenised:
    examples: list[Example]
    dropped: dict[str, int] = field(default_factory=dict)  # reason -> rows


def tokenise(
    rows: Iterable[tuple[Prompt, tuple[str, ...]]], template: Template, max_tokens: int, max_prompt_tokens: int
) -> Tokenised:
    """Over-long prompts keep their end, over-long responses are cut on the right (losing their end token); a row
    whose response is empty, or that has no prompt token to predict from, is dropped and counted."""
    examples: list[Example] = []
    dropped: Counter[str] = Counter()
    for prompt, responses in rows:
        prompt_ids = template.prompt_ids(prompt)[-max_prompt_tokens:]
        room = max_tokens - len(prompt_ids)
        response_ids = [template.response_ids(r)[:room] if r.strip() else [] for r in responses]
        if not prompt_ids:
            dropped["empty prompt"] += 1
        elif not all(response_ids):
            dropped["no supervised token"] += 1
        else:
            examples.append(Example(tuple(prompt_ids), tuple(map(tuple, response_ids))))
    return Tokenised(examples, dict(dropped))


_cache: dict[tuple[str, str, str], Tokenised] = {}


def examples_of(point: Point, part: str, template: Template) -> Tokenised:
    """The tokenised `sft` demonstrations, or the `train` or `validation` pairs. Raises ConfigError when none is left.

    Kept for the process: every point of a sweep reads the same ones.
    """
    key = (repr(point.dataset), repr(point.model), part)
    if key not in _cache:
        if len(_cache) >= 6:
            _cache.clear()
        source = source_of(point)
        if part == "sft":
            rows: list[tuple[Prompt, tuple[str, ...]]] = [(d.prompt, (d.response,)) for d in demonstrations_of(point)]
        else:
            rows = [(p.prompt, (p.chosen, p.rejected)) for p in source.pairs(part)]
        made = tokenise(rows, template, point.dataset.max_tokens, point.dataset.max_prompt_tokens)
        for reason, count in made.dropped.items():
            log.warning("%s %s: dropped %d of %d rows: %s", point.dataset.name, part, count, len(rows), reason)
        if not made.examples:
            raise ConfigError(
                f"dataset={point.dataset.name}: no {part} row is left after tokenisation ({made.dropped})"
            )
        _cache[key] = made
    return _cache[key]
