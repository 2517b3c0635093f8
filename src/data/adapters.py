"""Rows of public tables whose fields are laid out in a way of their own -> prompt, chosen, rejected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from src.data.rows import Row
from src.errors import ConfigError

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(row: Row) -> Row:
    """Anthropic/hh-rlhf: two whole conversations as text, which differ in the last answer (Bai et al. 2022)."""
    return {**row, **{name: _messages(row[name]) for name in ("chosen", "rejected")}}


def _messages(transcript: Any) -> list[dict[str, str]]:
    beginning, *parts = _TURN.split(transcript) if isinstance(transcript, str) else [""]
    if beginning.strip() or len(parts) < 4 or parts[-2] != "Assistant":
        raise ConfigError(
            f"not a conversation of Human: and Assistant:, the last of these, but {str(transcript)[:60]!r}"
        )
    return [{"role": _ROLES[who], "content": said} for who, said in zip(parts[::2], parts[1::2], strict=True)]


ADAPTERS: dict[str, Callable[[Row], Row]] = {"hh": hh}


def adapted(row: Row, columns: dict[str, str], adapter: str | None, where: str) -> Row:
    """The row by the names of `columns` (name here -> the table's), in a layout that is known here.
    Raises ConfigError naming `where`."""
    for name, column in columns.items():
        if column not in row:
            raise ConfigError(f"{where}: no column {column!r} for {name}; it has {', '.join(map(repr, row))}")
    row = {**row, **{name: row[column] for name, column in columns.items()}}
    if adapter is None:
        return row
    try:
        return ADAPTERS[adapter](row)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (
        LookupError,
        TypeError,
        ValueError,
        AttributeError,
    ) as error:  # a field absent, null or of another kind
        reason = f"{type(error).__name__}: {error}"
        raise ConfigError(
            f"{where}: adapter={adapter} cannot read it ({reason}); it has {', '.join(map(repr, row))}"
        ) from error
