"""Rows of any public preference layout -> prompts and responses, and the interface of their sources.

Errors name the file and line of the row.
"""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from src.errors import ConfigError
from src.planning.identity import DataInputs

Message = dict[str, str]  # {"role": ..., "content": ...}
Row = dict[str, Any]
# Iterates over rows while reporting progress; the string describes the operation.
ProgressFn = Callable[[Sequence[Any], str], Iterable[Any]]
# table -> split -> number of rows that the config expects
ExpectedRows = Mapping[str, Mapping[str, int]]
NO_EXPECTATION: ExpectedRows = {}

_ROLES = {"human": "user", "gpt": "assistant", "user": "user", "assistant": "assistant", "system": "system"}


@dataclass(frozen=True)
class Prompt:
    """A conversation up to the start of the response. A plain text prompt is one user message."""

    messages: tuple[Message, ...]
    facts: dict[str, str] = field(default_factory=dict, compare=False)  # of mini TL;DR, for its gold judge

    @property
    def key(self) -> tuple[str, ...]:
        """Roles and texts: hashable, and equal for equal conversations."""
        return tuple(part for m in self.messages for part in (m["role"], m["content"]))

    @property
    def text(self) -> str:
        return "\n\n".join(m["content"] for m in self.messages)


@dataclass(frozen=True)
class Demonstration:
    prompt: Prompt
    response: str

    @property
    def responses(self) -> tuple[str]:
        return (self.response,)


@dataclass(frozen=True)
class Pair:
    prompt: Prompt
    chosen: str
    rejected: str

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

    def demonstrations(self, track: ProgressFn = no_progress) -> list[Demonstration]:
        """Return what SFT learns."""
        raise NotImplementedError

    def pairs(self, split: str, track: ProgressFn = no_progress) -> list[Pair]:
        """Return the preference pairs of `train` or `validation`."""
        raise NotImplementedError

    def prompts(self, num_prompts: int) -> list[Prompt]:
        """Return the first held-out prompts to sample responses for, each once, always in the same order."""
        by_key = {pair.prompt.key: pair.prompt for pair in self.pairs("validation")}
        return list(by_key.values())[:num_prompts]

    def check(self) -> None:
        """Read local files, before anything runs. Raises ConfigError naming file and line."""


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
    for key in ("chosen", "rejected"):
        if key not in row:
            raise ConfigError(f"{where}: missing field {key!r}; it has {list_columns(row)}")
    return Pair(_prompt(row, where), *(_response(row[name], where, name) for name in ("chosen", "rejected")))


def _prompt(row: Row, where: str) -> Prompt:
    prompt = row.get("conversations", row.get("prompt"))
    if prompt is None:
        if not isinstance(row.get("chosen"), list):
            raise ConfigError(f"{where}: missing field: expected 'prompt' or 'conversations'")
        prompt = row["chosen"][:-1]
    return text_prompt(prompt) if isinstance(prompt, str) else Prompt(tuple(_messages(prompt, where)))


def parse_demonstration(row: Row, where: str) -> Demonstration:
    """Parse the chosen response of a pair, `messages` / `conversations`, or `prompt` and `completion` / `response`.

    User turns after the last assistant turn are ignored. Raises ConfigError naming `where`.
    """
    if "chosen" in row:
        return Demonstration(_prompt(row, where), _response(row["chosen"], where, "chosen"))
    turns = row.get("messages", row.get("conversations"))
    if turns is not None:
        messages = _messages(turns, where)
        while messages and messages[-1]["role"] != "assistant":
            messages.pop()
        if len(messages) < 2:
            raise ConfigError(f"{where}: a conversation needs a user turn and an assistant turn after it")
        return Demonstration(Prompt(tuple(messages[:-1])), messages[-1]["content"])
    response = row.get("completion", row.get("response"))
    if "prompt" not in row or response is None:
        raise ConfigError(f"{where}: needs messages, or prompt and completion; it has {list_columns(row)}")
    return Demonstration(_prompt(row, where), _response(response, where, "completion"))


def _messages(turns: Any, where: str) -> list[Message]:
    if not isinstance(turns, list):
        raise ConfigError(f"{where}: a conversation is a list of messages, not {type(turns).__name__}")
    return [_message(turn, where) for turn in turns]


def _message(turn: Any, where: str) -> Message:
    if not isinstance(turn, dict):
        raise ConfigError(f"{where}: a message is an object with role and content, not {type(turn).__name__}")
    role, content = turn.get("role", turn.get("from")), turn.get("content", turn.get("value"))
    if role not in _ROLES or not isinstance(content, str):
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


def sample_indices(num_rows: int, num_samples: int | None, seed: int | str) -> list[int]:
    """Return a seeded sample of range(num_rows), ascending; num_samples=None: all.

    A smaller sample is a subset of every larger one of the same seed.
    """
    order = list(range(num_rows))
    random.Random(seed).shuffle(order)
    return sorted(order[:num_samples])


def read_rows(path: str, key: str = "dataset.path") -> list[tuple[str, dict[str, Any]]]:
    """Return (where, row) for every row of a JSON list or a JSON-lines file.

    key: the config key that names the file. Raises ConfigError naming file and line.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise ConfigError(f"{key}={path}: {error.strerror}") from None
    except UnicodeDecodeError as error:
        line_number = Path(path).read_bytes()[: error.start].count(b"\n") + 1
        raise ConfigError(f"{path}, line {line_number}: not UTF-8 ({error.reason})") from None
    if text.lstrip().startswith("["):
        rows = [(f"{path}, entry {i}", row) for i, row in enumerate(_parse_json(text, path))]
    else:
        lines = [(number, line) for number, line in enumerate(text.split("\n"), start=1) if line.strip()]
        rows = [(f"{path}, line {number}", _parse_json(line, path, number)) for number, line in lines]
    if not rows:
        raise ConfigError(f"{key}={path}: the file has no rows")
    for where, row in rows:
        if not isinstance(row, dict):
            raise ConfigError(f"{where}: a row is an object, not {type(row).__name__}")
    return rows


def _parse_json(text: str, path: str, first_line: int = 1) -> Any:
    try:
        return json.loads(text)
    except json.JSONDecodeError as error:
        raise ConfigError(f"{path}, line {first_line + error.lineno - 1}: not JSON ({error.msg})") from None
