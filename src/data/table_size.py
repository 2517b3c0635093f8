"""Rows and tokens that the stages of a point read: of local files by a sample of them, of the hub by conf/dataset."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from functools import lru_cache
from pathlib import Path
from statistics import fmean
from typing import Any

from src.config.schema import Point
from src.config.tables import HubTable, ListedTable
from src.data.row_samples import rows_of_each
from src.data.rows import Demonstration, Pair, Source
from src.data.sources import SOURCES, open_source
from src.planning.content import locate
from src.planning.inputs import pair_data, sft_data
from src.planning.model_shape import cached_on_hub
from src.planning.weight_files import read_gguf_header

SAMPLED_ROWS = 128
CHARACTERS_PER_TOKEN = 4  # of English text, where the tokenizer is not on this machine
_CONTROL_TOKENS = 4  # of the header of a chat message, with the end of the one before, besides its role

CountTokens = Callable[[str], int]
AnyTable = HubTable | ListedTable


@dataclass(frozen=True)
class TableSize:
    """Rows, and mean tokens of a row: those of its prompt, and of each of its responses. NaN where not known."""

    rows: float
    prompt_tokens: float
    response_tokens: float
    responses: int  # 2 of pairs, 1 of demonstrations

    @property
    def tokens(self) -> float:
        """Mean tokens of a row: the prompt of a pair is computed once."""
        return self.prompt_tokens + self.responses * self.response_tokens


_sizes: dict[str, TableSize] = {}


def table_size(point: Point, split: str) -> TableSize:
    """Return the size of `sft`, `sft_validation`, `train` or `validation`, once for points of equal rows and tokenizer.

    Raises ConfigError when a local row cannot be read.
    """
    model = point.model
    key = repr((point.dataset, point.pairs, split, model.path, model.revision, model.template))
    if key not in _sizes:
        size = _table_size(point, split)
        _sizes[key] = _on_policy_size(point, size) if split == "train" and point.pairs.name == "onpolicy" else size
    return _sizes[key]


def num_dataset_pairs(point: Point) -> float:
    """Return the training pairs of the dataset, at most; NaN where nothing tells."""
    return _table_size(point, "train").rows


def num_candidates(point: Point) -> float:
    """Return the responses that are sampled for on-policy pairs, at most; NaN where nothing tells."""
    assert point.pairs.generation is not None
    return _num_candidate_prompts(point) * point.pairs.generation.samples_per_prompt


def _num_candidate_prompts(point: Point) -> float:
    """Return the prompts that on-policy responses are sampled for, at most: pairs of one prompt count each."""
    known = [num_dataset_pairs(point), point.pairs.num_prompts]
    return min((n for n in known if n is not None and not math.isnan(n)), default=math.nan)


def _on_policy_size(point: Point, table: TableSize) -> TableSize:
    """Return the size of the pairs that are made of samples, at most, for prompts of a table.

    Responses are taken to be as long as the table's, as far as they may.
    """
    pairs = point.pairs
    assert pairs.generation is not None
    several = pairs.generation.samples_per_prompt
    of_a_prompt = 1 if pairs.selection == "best_worst" else math.comb(several, 2)
    response_tokens = min(table.response_tokens, pairs.generation.max_new_tokens)
    return replace(table, rows=_num_candidate_prompts(point) * of_a_prompt, response_tokens=response_tokens)


def _table_size(point: Point, split: str) -> TableSize:
    data, source, responses = point.dataset, _source(point, split), 1 if split.startswith("sft") else 2
    tables: list[AnyTable | None] = [None]
    if data.source == "hub":
        described = data.tables("sft" if responses == 1 else "preference")
        tables = [table for _, table in described if _split_of(table, split) is not None]
    rows = [_num_rows(n, table, split) for n, table in zip(source.num_rows(split), tables, strict=True)]
    samples = source.sample(split, SAMPLED_ROWS)
    lengths = [_mean_lengths(*each, point, responses) for each in zip(samples, tables, strict=True)]
    weights = [table.weight if isinstance(table, ListedTable) else None for table in tables]
    wanted = getattr(data, f"{split}_size")
    if any(map(math.isnan, rows)):
        total, parts = math.nan if wanted is None else wanted, [1.0 if w is None else w for w in weights]
    else:
        parts = list(map(float, rows_of_each(list(map(round, rows)), weights, wanted)))
        total = sum(parts)
    prompt, response = (
        sum(p * values[i] for p, values in zip(parts, lengths, strict=True)) / (sum(parts) or 1) for i in (0, 1)
    )
    return TableSize(total, prompt, response, responses)


def _mean_lengths(
    sample: Sequence[Demonstration | Pair], table: AnyTable | None, point: Point, responses: int
) -> tuple[float, float]:
    """Return the mean tokens of a prompt and of a response: of a sample, or as the config states them."""
    if sample:
        count = _tokenizer(point.model.path, point.model.revision)
        lengths = [_lengths(row, point, count) for row in sample]
        return fmean(p for p, _ in lengths), fmean(r for _, r in lengths)
    tokens = math.nan if table is None or table.tokens is None else table.tokens
    prompt = tokens / 2 if table is None or table.prompt_tokens is None else table.prompt_tokens
    return prompt, (tokens - prompt) / responses


def _source(point: Point, split: str) -> Source:
    pairs = pair_data(point)
    if (
        pairs.source == "jsonl" and split != "sft_validation"
    ):  # SFT takes its rows from the same pairs, and their file has been read for them
        return open_source(pairs)
    return SOURCES[pairs.source](sft_data(point) if split.startswith("sft") else pairs)


def _split_of(table: AnyTable, split: str) -> str | None:
    return table.validation_split if split.endswith("validation") else table.train_split


def _num_rows(counted: int | None, table: AnyTable | None, split: str) -> float:
    """Return the rows that may be used: of those counted, what the filters of the table are expected to leave."""
    expected = size = None
    if table is not None:
        expected = table.rows.get(_split_of(table, split) or "")
        if counted is not None and not (table.deduplicate or table.drop_if_rejected_elsewhere or table.where):
            expected = None
        size = table.size if isinstance(table, ListedTable) and not split.endswith("validation") else None
    usable = min((rows for rows in (counted, expected) if rows is not None), default=math.nan)
    if table is not None and table.held_out is not None:  # of prompts, but about as many of the rows
        usable *= table.held_out if split.endswith("validation") else 1 - table.held_out
    return usable if size is None else min(size, usable)


def _lengths(row: Demonstration | Pair, point: Point, count: CountTokens) -> tuple[float, float]:
    """Return the tokens of the prompt, cut as the dataset is, and the mean of those of the responses."""
    data, is_chat = point.dataset, point.model.template != "plain"
    longest = 8 * data.max_tokens  # characters, of which more would be cut off anyway

    def header(role: str) -> int:
        return _CONTROL_TOKENS + count(role) if is_chat else 0

    prompt = 1 + sum(header(m["role"]) + count(m["content"][-longest:]) for m in row.prompt.messages)
    prompt = min(prompt + header("assistant"), data.max_prompt_tokens)
    responses = [min(count(text[:longest]) + 1, data.max_tokens - prompt) for text in row.responses]
    return prompt, fmean(responses)


@lru_cache(maxsize=8)
def _tokenizer(location: str, revision: str | None) -> CountTokens:
    """Return what counts the tokens of a text; an estimate when the model's tokenizer is not on this machine."""
    path = locate(location) or cached_on_hub(location, revision)
    with suppress(Exception):  # whatever the library raises for a file it cannot read: this is an estimate
        tokenizer = None if path is None else _gguf_tokenizer(path) if path.is_file() else _read_tokenizer(path)
        if tokenizer is not None:
            return lambda text: len(tokenizer.encode(text, add_special_tokens=False).ids)
    return lambda text: math.ceil(len(text) / CHARACTERS_PER_TOKEN)


def _read_tokenizer(folder: Path) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_file(str(folder / "tokenizer.json"))


def _gguf_tokenizer(file: Path) -> Any:
    """Return the byte-level BPE of a GGUF file; None for another kind. Words are split about as the model's are."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    metadata = read_gguf_header(file).metadata
    if metadata["tokenizer.ggml.model"] != "gpt2":
        return None
    vocabulary = {token: i for i, token in enumerate(metadata["tokenizer.ggml.tokens"])}
    merges = [tuple(merge.split(" ", 1)) for merge in metadata["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(vocab=vocabulary, merges=merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    return tokenizer
