"""Rows of any public preference layout -> prompts and responses, and the interface of their sources.

Errors name the file and line of the row.
"""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.data.conversation_parts import refuse_tools_and_thinking
from src.errors import ConfigError
from src.planning.identity import DataInputs

Message = dict[str, str]  # {"role": ..., "content": ...}
Row = dict[str, Any]
# Iterates over rows while reporting progress; the string describes the operation.
ProgressFn = Callable[[Sequence[Any], str], Iterable[Any]]
# table -> split -> number of rows that the config expects
ExpectedRows = Mapping[str, Mapping[str, int]]
NO_EXPECTATION: ExpectedRows = {}

_SURROGATE = re.compile(r"\\u[dD][89a-fA-F]")  # in JSON; two halves that belong together are a character

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the start of the response. A plain text prompt is one user message."""

    messages: tuple[Message, ...]
    # For judges: the facts of a post of mini TL;DR, or the `answer` of a problem.
    facts: dict[str, str] = field(default_factory=dict, compare=False)
    source: str = field(default="", compare=False)  # the table of a mixture, or the part of a benchmark, that it is of
    follow_ups: tuple[str, ...] = field(default=(), compare=False)  # of the user, each after a response

    @property
    def key(self) -> tuple[str, ...]:
        """Roles and texts: hashable, and equal for equal conversations."""
        return tuple(part for m in self.messages for part in (m["role"], m["content"]))

    @property
    def stripped_key(self) -> tuple[str, ...]:
        """The key without blanks around the texts: templates strip them, so prompts that differ only there are one."""
        return tuple(part.strip() for part in self.key)

    @property
    def text(self) -> str:
        return "\n\n".join(m["content"] for m in self.messages)


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    response: str
    where: str = field(default="", compare=False)  # file or table, and line, entry or row

    @property
    def responses(self) -> tuple[str]:
        return (self.response,)


@dataclass(frozen=True)
class Pair:
    prompt: Prompt
    chosen: str
    rejected: str
    where: str = field(default="", compare=False)

    @property
    def responses(self) -> tuple[str, str]:
        return (self.chosen, self.rejected)


def no_progress(rows: Sequence[Any], description: str) -> Sequence[Any]:
    return rows


class Source:
    """Where the rows of a run come from.

    track: iterates over rows and reports progress, since reading a large table takes minutes.
    """

    def __init__(self, data: DataInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> None:
        self.data, self.expected_rows = data, expected_rows

    def demonstrations(self, track: ProgressFn = no_progress) -> Sequence[Demonstration]:
        """Return what SFT learns."""
        raise NotImplementedError

    def held_out_demonstrations(self, track: ProgressFn = no_progress) -> Sequence[Demonstration]:
        """Return what SFT is validated on."""
        raise NotImplementedError

    def pairs(self, split: str, track: ProgressFn = no_progress) -> Sequence[Pair]:
        """Return the preference pairs of `train` or `validation`."""
        raise NotImplementedError

    def prompts(self, num_prompts: int) -> list[Prompt]:
        """Return the first held-out prompts to sample responses for, each once, always in the same order."""
        by_key: dict[tuple[str, ...], Prompt] = {}
        for pair in self.pairs("validation"):
            by_key.setdefault(pair.prompt.stripped_key, pair.prompt)
        return list(by_key.values())[:num_prompts]

    def num_rows(self, split: str) -> list[int | None]:
        """Return the rows of each table of `sft`, `train` or `validation`, before filters; None where nothing tells."""
        raise NotImplementedError

    def sample(self, split: str, count: int) -> list[Sequence[Demonstration | Pair]]:
        """Return about `count` rows that stand for each table of a split; none when it is not on this machine."""
        raise NotImplementedError

    def check(self) -> None:
        """Read local files, before anything runs. Raises ConfigError naming file and line."""


def name_of(data: DataInputs) -> str:
    """Return what the rows of a dataset come from, for messages: the key and its value."""
    return f"dataset.source={data.source}" if data.path is None else f"dataset.path={data.path.location}"


def text_prompt(text: str, facts: dict[str, str] | None = None) -> Prompt:
    """Return the prompt of a single user message."""
    return Prompt(({"role": "user", "content": text},), facts or {})


def list_columns(row: Row) -> str:
    """Return the names of the row's columns for a message."""
    return ", ".join(map(repr, row)) or "none"


def parse_pair(row: Row, where: str) -> Pair:
    """Parse `prompt` (text or messages) or `conversations`, `chosen` and `rejected`.

    A response is text, a message, or messages that may repeat the prompt. Raises ConfigError naming `where`.
    """
    refuse_tools_and_thinking(row, where, is_message=False)
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ConfigError(f"{where}: missing field {key!r}; it has {list_columns(row)}")
    chosen, rejected = (_response(row[name], where, name) for name in ("chosen", "rejected"))
    return Pair(_prompt(row, where), chosen, rejected, where)


def _first(row: Row, *names: str) -> Any:
    """Return the first of these fields that is there and not null; tables of mixed layouts have them all.

    None without one.
    """
    return next((row[name] for name in names if row.get(name) is not None), None)


def _prompt(row: Row, where: str) -> Prompt:
    prompt = _first(row, "conversations", "prompt")
    if prompt is None:
        if not isinstance(row.get("chosen"), list):
            raise ConfigError(f"{where}: missing field: expected 'prompt' or 'conversations'")
        prompt = row["chosen"][:-1]
    return text_prompt(prompt) if isinstance(prompt, str) else Prompt(tuple(_messages(prompt, where)))


def parse_demonstration(row: Row, where: str) -> Demonstration:
    """Parse the chosen response of a pair, `messages` / `conversations`, or `prompt` and `completion` / `response`.

    User turns after the last assistant turn are ignored. Raises ConfigError naming `where`.
    """
    refuse_tools_and_thinking(row, where, is_message=False)
    if row.get("chosen") is not None:
        return Demonstration(_prompt(row, where), _response(row["chosen"], where, "chosen"), where)
    turns = _first(row, "messages", "conversations")
    if turns is not None:
        messages = _messages(turns, where)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if len(messages) < 2:
            raise ConfigError(f"{where}: a conversation needs a user turn and an assistant turn after it")
        return Demonstration(Prompt(tuple(messages[:-1])), messages[-1]["content"], where)
    response = _first(row, "completion", "response")
    if row.get("prompt") is None or response is None:
        raise ConfigError(f"{where}: needs messages, or prompt and completion; it has {list_columns(row)}")
    return Demonstration(_prompt(row, where), _response(response, where, "completion"), where)


def _messages(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list):
        raise ConfigError(f"{where}: a conversation is a list of messages, not {type(turns).__name__}")
    if not turns:
        raise ConfigError(f"{where}: the conversation before the response has no message")
    return [_message(turn, where) for turn in turns]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: a message is an object with role and content, not {type(turn).__name__}")
    refuse_tools_and_thinking(turn, where, is_message=True)
    role, content = _first(turn, "role", "from"), _first(turn, "content", "value")
    if not isinstance(role, str) or role not in _ROLES or not isinstance(content, str):
        raise ConfigError(f"{where}: a message needs role|from in {', '.join(_ROLES)} and content|value as text")
    return {"role": _ROLES[role], "content": content}


def _response(value: Any, where: str, name: str) -> str:
    if isinstance(value, list) and value:
        value = value[-1]
    if isinstance(value, dict):
        return _message(value, where)["content"]
    if not isinstance(value, str):
        raise ConfigError(f"{where}: {name} must be text, a message, or a list of messages")
    return value


def read_rows(path: str, key: str = "dataset.path") -> list[tuple[str, dict[str, Any]]]:
    """Return (where, row) for every row of a JSON list, a JSON-lines file or a Parquet file (by its name).

    key: the config key that names the file. Raises ConfigError naming file and line, for what is not JSON, and for
    JSON that says two things (a key twice) or nothing that can be written down again (half a surrogate pair).
    """
    if Path(path).suffix == ".parquet":
        return _read_parquet(path, key)
    try:
        require_regular_file(Path(path), key)
        text = Path(path).read_text(encoding="utf-8").removeprefix("\ufeff")
    except OSError as error:
        raise ConfigError(f"{key}={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line_number = Path(path).read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line_number}: not UTF-8 ({error.reason})") from None
    if text.lstrip().startswith("["):
        rows = [(f"{path}, entry {i}", row) for i, row in enumerate(_parse_json(text, path, 1))]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(f"{path}, line {number}", _parse_json(line, path, number)) for number, line in lines]
    if not rows:
        raise ConfigError(f"{key}={path}: the file has no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a row is an object, not {type(row).__name__}")
    if _SURROGATE.search(text):
        for where, row in rows:
            _refuse_half_surrogates(row, where)
    return rows


def _read_parquet(path: str, key: str) -> list[tuple[str, Row]]:
    import pyarrow
    from pyarrow import parquet

    require_regular_file(Path(path), key)
    try:
        rows = parquet.read_table(path).to_pylist()
    except (OSError, pyarrow.ArrowException) as error:
        raise ConfigError(f"{key}={path}: cannot be read as Parquet ({str(error).splitlines()[0]})") from None
    if not rows:
        raise ConfigError(f"{key}={path}: the file has no rows")
    return [(f"{path}, row {number}", row) for number, row in enumerate(rows)]


def require_regular_file(path: Path, key: str) -> None:
    """Raise ConfigError for a FIFO, a device or a folder, which cannot be read, or not twice, as stages do."""
    if path.exists() and not path.is_file():
        raise ConfigError(f"{key}={path}: not a regular file; stages read it several times, so give a file on disk")


def _refuse_half_surrogates(row: Row, where: str) -> None:
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(error.object[error.start]):04x}"
        raise ConfigError(
            f"{where}: a lone half of a surrogate pair, {half}: the text was cut inside a character"
        ) from None


def _parse_json(text: str, path: str, first_line: int) -> Any:
    where = f"{path}, line {first_line}"
    try:
        return json.loads(text, object_pairs_hook=_object)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg})") from None
    except RecursionError:
        raise ConfigError(f"{where}: cannot be read: objects or lists are nested too deeply") from None
    except ValueError as error:  # of `_object`, or of a number with thousands of digits
        raise ConfigError(f"{where}: cannot be read: {str(error).partition(';')[0]}") from None


def _object(items: list[tuple[str, Any]]) -> Row:
    row = dict(items)
    if len(row) < len(items):
        repeated = next(name for name, count in Counter(name for name, _ in items).items() if count > 1)
        raise ValueError(f"an object has the key {repeated[:60]!r} twice")
    return row
