"""What validation rows must be: of two prompts at least where they select, and not of prompts that are trained on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from functools import lru_cache
from typing import NamedTuple

from src.data.examples import Example
from src.data.rows import name_of
from src.data.tokenization import TokenizedExamples
from src.errors import StageError
from src.planning.identity import DataInputs

log = logging.getLogger(__name__)


class Leaks(NamedTuple):
    """Validation pairs whose prompt is trained on, and those of them that are training pairs themselves."""

    same_prompt: int
    same_pair: int


def check_held_out(
    data: DataInputs, training: TokenizedExamples, validation: TokenizedExamples, min_prompts: int, what: str
) -> Leaks:
    """Count leaks, and warn of them. what: the rows of `training`, for the warning.

    Raises StageError when validation has fewer than `min_prompts` prompts: one half of them selects, the other reports.
    """
    if (count := len({example.prompt for example in validation})) < min_prompts:
        raise StageError(
            f"{name_of(data)}: {count} distinct prompt in {len(validation)} validation pairs (prompts are cut to "
            f"dataset.max_prompt_tokens={data.max_prompt_tokens}); selection and reporting need one each, at least "
            f"{min_prompts}: raise dataset.validation_size or dataset.max_prompt_tokens"
        )
    return warn_of_leaks(data, training, validation, what)


def warn_of_leaks(data: DataInputs, training: TokenizedExamples, validation: TokenizedExamples, what: str) -> Leaks:
    """Count validation rows, pairs or demonstrations, whose prompt is trained on, and warn of them."""
    leaks = count_leaks(training, validation, data.max_prompt_tokens)
    if leaks.same_prompt:
        row = "pair" if len(validation[0].responses) == 2 else "demonstration"
        equal = f", {leaks.same_pair} of them as the same {row}" if leaks.same_pair else ""
        log.warning(
            "%s: %d of %d validation %ss have a prompt that is among the %s%s: their figures are not held-out ones",
            name_of(data), leaks.same_prompt, len(validation), row, what, equal,
        )  # fmt: skip
    return leaks


@lru_cache(maxsize=4)  # the points that a worker computes have the same data one after another
def count_leaks(training: TokenizedExamples, validation: TokenizedExamples, max_prompt_tokens: int) -> Leaks:
    """Compare token ids: what a model reads, after the template has stripped blanks and long prompts have been cut."""
    held_out = {example.prompt for example in validation}
    prompts: set[tuple[int, ...]] = set()
    pairs: set[Example] = set()
    for example in training:
        prompts.update(held_out.intersection(_prompts(example, max_prompt_tokens)))
        if example.prompt in prompts:
            pairs.add(example)
    same_prompt = [example for example in validation if example.prompt in prompts]
    return Leaks(len(same_prompt), sum(example in pairs for example in same_prompt))


def _prompts(example: Example, max_prompt_tokens: int) -> Iterator[tuple[int, ...]]:
    """Yield the prompt of every answer of a conversation."""
    yield example.prompt
    for _, end in example.unsupervised_spans:
        yield (example.prompt + example.responses[0][:end])[-max_prompt_tokens:]
