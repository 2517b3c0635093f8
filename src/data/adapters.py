"""Adapters from the row layouts of public tables to prompt, chosen, rejected."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

from src.data.rows import Row, list_columns
from src.errors import ConfigError

_TURN = re.compile(r"\n\n(Human|Assistant): ?")
_ROLES = {"Human": "user", "Assistant": "assistant"}


def hh(row: Row) -> Row:
    """Read Anthropic/hh-rlhf: two transcripts that differ in the last answer (Bai et al. 2022)."""
    return {**row, **{name: _parse_transcript(row[name]) for name in ("chosen", "rejected")}}


def _parse_transcript(transcript: Any) -> list[dict[str, str]]:
    start, *parts = _TURN.split(transcript) if isinstance(transcript, str) else [""]
    if start.strip() or len(parts) < 4 or parts[-2] != "Assistant":
        raise ConfigError(
            f"expected a Human:/Assistant: transcript ending with Assistant:, got {str(transcript)[:60]!r}"
        )
    return [{"role": _ROLES[role], "content": text} for role, text in zip(parts[::2], parts[1::2], strict=True)]


ADAPTERS: dict[str, Callable[[Row], Row]] = {"hh": hh}


def adapt_row(row: Row, columns: dict[str, str], adapter: str | None, where: str) -> Row:
    """Return the row with its columns renamed and its adapter applied.

    columns: name in this project -> name in the table. Raises ConfigError naming `where`.
    """
    for name, column in columns.items():
        if column not in row:
            raise ConfigError(f"{where}: no column {column!r} for {name}; it has {list_columns(row)}")
    row = {**row, **{name: row[column] for name, column in columns.items()}}
    if adapter is None:
        return row
    try:
        return ADAPTERS[adapter](row)
    except ConfigError as error:
        raise ConfigError(f"{where}: {error}") from error
    except (LookupError, TypeError, ValueError, AttributeError) as error:  # a missing, null or unexpected field
        reason = f"adapter={adapter} cannot read it ({type(error).__name__}: {error})"
        raise ConfigError(f"{where}: {reason}; it has {list_columns(row)}") from error
