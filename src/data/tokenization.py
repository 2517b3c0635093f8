"""Rows -> token ids: truncated, counted where dropped, and cached on disk for every stage that reads the same rows."""

from __future__ import annotations

import logging
import shutil
from collections import Counter
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice, pairwise
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import datasets
import pyarrow

from src.data.examples import Example
from src.data.rows import Demonstration, ExpectedRows, Pair, name_of
from src.data.sources import open_source, rows_of, training_rows
from src.data.templates import Template
from src.errors import ConfigError, DamagedFile
from src.planning.content import digest, hashable, reading
from src.planning.identity import DataInputs, ModelInputs
from src.store.attempt import Attempt
from src.store.files import fsync_tree, publish_folder, read_checksummed_json, with_checksum, write_json
from src.store.integrity import describe_files
from src.store.store import Store

log = logging.getLogger(__name__)

VERSION = 4  # raise it when the same rows become other tokens: cached ones are then not reused
COUNTS_FILE = "counts.json"  # beside the Arrow file: counts of rows, and sizes and digests of the files
CHUNK_ROWS = 1000  # converted to Arrow at a time: a whole table of Python integers takes ten times the memory

_TOKENS = datasets.List(datasets.Value("int32"))
_FEATURES = datasets.Features(
    {
        "prompt": _TOKENS,
        "responses": datasets.List(_TOKENS),
        "unsupervised_spans": datasets.List(_TOKENS),
        "source": datasets.Value("string"),
    }
)

datasets.disable_progress_bars()


class TokenizedExamples(Sequence[Example]):
    """The rows of a dataset as Examples.

    Training reads every example several times, so they are sliced from numpy views of the Arrow columns, which is far
    faster than indexing the dataset.
    """

    def __init__(self, dataset: datasets.Dataset) -> None:
        prompts, responses, spans, self._sources = (dataset.data.column(name).combine_chunks() for name in _FEATURES)
        self._prompt_ends, self._prompt_tokens = prompts.offsets.to_numpy(), prompts.values.to_numpy()
        self._responses, self._spans = _NestedColumn(responses), _NestedColumn(spans)

    def __len__(self) -> int:
        return len(self._prompt_ends) - 1

    def __getitem__(self, index: Any) -> Any:
        """Return the example at an index, or the list of those in a slice."""
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(len(self)))]
        index = range(len(self))[index]
        start, end = self._prompt_ends[index : index + 2]
        prompt = tuple(self._prompt_tokens[start:end].tolist())
        return Example(prompt, self._responses.row(index), self._spans.row(index), self._sources[index].as_py())


class _NestedColumn:
    """A column whose rows are lists of lists of integers, from the Arrow array of it."""

    def __init__(self, column: Any) -> None:
        self._row_ends = column.offsets.to_numpy()
        self._list_ends, self._values = column.values.offsets.to_numpy(), column.values.values.to_numpy()

    def row(self, index: int) -> Any:
        start, end = self._row_ends[index : index + 2]
        ends = self._list_ends[start : end + 1].tolist()
        return tuple(tuple(self._values[a:b].tolist()) for a, b in pairwise(ends))


@dataclass
class RowCounts:
    """What became of rows: how many were dropped, by reason, and how many spell a control token, which stays text.

    first: where the first row that spells one is, after the path of its file or folder.
    """

    dropped: dict[str, int] = field(default_factory=dict)
    spelling_control_tokens: int = 0
    first: str = ""


class TokenizedDataset:
    """Tokenized rows, in memory or memory-mapped, and counts of the rows they were made of."""

    def __init__(self, dataset: datasets.Dataset, counts: RowCounts) -> None:
        self.dataset, self.counts = dataset, counts
        self.examples = TokenizedExamples(dataset)

    @classmethod
    def collect(
        cls, examples: Iterable[Example], counts: RowCounts, max_examples: int | None = None
    ) -> TokenizedDataset:
        """Keep examples that a model can learn from, the first max_examples; count others by the reason why not."""
        dropped: Counter[str] = Counter()

        def rows() -> Iterator[dict[str, Any]]:
            for example in examples:
                if reason := _why_useless(example):
                    dropped[reason] += 1
                else:
                    yield vars(example)

        remaining = islice(rows(), max_examples)
        chunks = [datasets.Dataset.from_dict({name: [] for name in _FEATURES}, _FEATURES)]
        while chunk := list(islice(remaining, CHUNK_ROWS)):
            chunks.append(datasets.Dataset.from_list(chunk, _FEATURES))
        counts.dropped = dict(dropped)
        return cls(datasets.concatenate_datasets(chunks), counts)

    @classmethod
    def load(cls, folder: Path) -> TokenizedDataset | None:
        """Return what `save` wrote, memory-mapped; None without it. A cache that is not as it was saved is deleted."""
        try:
            saved = read_checksummed_json(folder / COUNTS_FILE)
            files = {name: entry for name, entry in describe_files(folder).items() if name != COUNTS_FILE}
            if files != saved["files"]:
                raise DamagedFile(f"{folder}: damaged, its content is not what was saved")
            return cls(datasets.load_from_disk(folder), RowCounts(**saved["counts"]))
        except (OSError, ValueError, TypeError, KeyError):
            shutil.rmtree(folder, ignore_errors=True)
            return None

    def save(self, folder: Path) -> None:
        """Write the folder whole or not at all. When several processes save the same rows, the first one wins."""
        folder.parent.mkdir(parents=True, exist_ok=True)
        with TemporaryDirectory(dir=folder.parent, prefix=".draft-") as temporary:
            draft = Path(temporary) / folder.name
            self.dataset.save_to_disk(draft)
            saved = {"counts": vars(self.counts), "files": describe_files(draft)}
            write_json(draft / COUNTS_FILE, with_checksum(saved))
            fsync_tree(draft)
            publish_folder(draft, folder)

    def write(self, file: Path) -> None:
        """Write the examples to an Arrow file, without the counts."""
        table = self.dataset.data.table
        with pyarrow.OSFile(str(file), "wb") as sink, pyarrow.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)

    @classmethod
    def read(cls, file: Path, counts: RowCounts) -> TokenizedDataset:
        """Return what `write` wrote, memory-mapped."""
        return cls(datasets.Dataset.from_file(str(file)), counts)


def _why_useless(example: Example) -> str | None:
    """Return why nothing can be learned from an example; None when something can."""
    if not example.prompt:
        return "empty prompt"  # no token to predict the first one from
    if not all(example.responses):
        return "no supervised token"
    if len(example.responses) == 2 and example.responses[0] == example.responses[1]:
        return "chosen equals rejected"
    return None


def tokenize(
    rows: Iterable[Pair | Demonstration],
    template: Template,
    max_tokens: int,
    max_prompt_tokens: int,
    max_examples: int | None = None,
) -> TokenizedDataset:
    """Return an example of two responses for each pair, of one response for each demonstration.

    No row is read after the last of max_examples. A prompt over its limit keeps its end; a response over its limit is
    cut on the right and loses its end token.
    Raises ConfigError, naming the row, when the template cannot write it.
    """
    counts = RowCounts()

    def example(row: Pair | Demonstration) -> Example:
        if template.spells_control_token(row):
            counts.first = counts.first or row.where
            counts.spelling_control_tokens += 1
        try:
            if isinstance(row, Demonstration):
                return _tokenize_conversation(row, template, max_tokens, max_prompt_tokens)
            return _tokenize_pair(row, template, max_tokens, max_prompt_tokens)
        except ConfigError as error:
            raise ConfigError(f"{row.where}: {error}" if row.where else str(error)) from error

    return TokenizedDataset.collect(map(example, rows), counts, max_examples)


def _tokenize_pair(row: Pair, template: Template, max_tokens: int, max_prompt_tokens: int) -> Example:
    prompt = template.prompt_ids(row.prompt)[-max_prompt_tokens:]
    limit = max_tokens - len(prompt)
    ids = [template.response_ids(text)[:limit] if text.strip() else [] for text in row.responses]
    return Example(tuple(prompt), tuple(map(tuple, ids)), source=row.prompt.source)


def _tokenize_conversation(row: Demonstration, template: Template, max_tokens: int, max_prompt_tokens: int) -> Example:
    """Return an example whose response starts with the first answer; every answer carries loss, with its end token."""
    first_prompt, turns = template.turns(row.prompt)
    prompt = first_prompt[-max_prompt_tokens:]
    response: list[int] = []
    spans: list[tuple[int, int]] = []
    for answer, next_prompt in turns:
        response += answer
        spans.append((len(response), len(response) + len(next_prompt)))
        response += next_prompt
    response = response + template.response_ids(row.response) if row.response.strip() else []
    response = response[: max_tokens - len(prompt)]
    while spans and spans[-1][1] >= len(response):  # cut inside a user turn: end with the answer before it
        response = response[: spans.pop()[0]]
    return Example(tuple(prompt), (tuple(response),), tuple(spans), row.prompt.source)


_cache: dict[str, TokenizedDataset] = {}


def load_examples(
    data: DataInputs, model: ModelInputs, split: str, template: Template, attempt: Attempt, expected_rows: ExpectedRows
) -> TokenizedDataset:
    """Return the tokenized `sft` or `sft_validation` demonstrations, or the `train` or `validation` pairs.

    They are those that stages read.

    Tokens are cached on disk for every stage that reads the same rows, and in the process. Raises ConfigError when no
    row remains.
    """
    is_training = not split.endswith("validation")
    data = data if is_training else data.held_out
    added = [part for part in (list(model.end_tokens), model.system_prompt) if part]  # without, keys are as before
    key = digest([VERSION, split, hashable(data), model.path.fingerprint, hashable(model)["template"], *added])
    if key not in _cache:
        if len(_cache) >= 6:
            _cache.clear()
        folder = Store(attempt.output_dir).tokenized(key)
        tokenized = TokenizedDataset.load(folder)
        if tokenized is None:
            source, track = open_source(data, expected_rows), attempt.track
            with reading(data.path):  # of a table rows are read when they are tokenized
                rows = (training_rows if is_training else rows_of)(source, split, track)
                tracked = track(rows, f"tokens of {split} rows")
                limits = data.max_tokens, data.max_prompt_tokens, data.max_examples
                tokenized = tokenize(tracked, template, *limits)
            # Tokens are kept by content, which may move.
            tokenized.counts.first = tokenized.counts.first.removeprefix(data.path.location if data.path else "")
            tokenized.save(folder)
        _warn(data, split, len(tokenized.examples), tokenized.counts)
        if not tokenized.examples:
            reasons = ", ".join(f"{count} dropped: {reason}" for reason, count in tokenized.counts.dropped.items())
            raise ConfigError(f"{name_of(data)}: no {split} row remains after tokenization ({reasons or 'none read'})")
        _cache[key] = tokenized
    return _cache[key]


def _warn(data: DataInputs, split: str, num_kept: int, counts: RowCounts) -> None:
    num_rows = num_kept + sum(counts.dropped.values())
    for reason, count in counts.dropped.items():
        log.warning("%s: dropped %d of %d %s rows: %s", name_of(data), count, num_rows, split, reason)
    if counts.spelling_control_tokens:
        log.warning(
            "%s: %d of %d %s rows spell a control token of the model, which is read as ordinary text; one is %s",
            name_of(data), counts.spelling_control_tokens, num_rows, split, counts.first.lstrip(",/ "),
        )  # fmt: skip
