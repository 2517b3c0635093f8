"""Conversations of several turns."""

from __future__ import annotations

from collections.abc import Sequence

from src.data.rows import Demonstration, parse_demonstration

TURNS = ("Hi", "Yes?", "How are you", "well , thanks", "Bye", "See you")


def conversation(turns: Sequence[str] = TURNS, before: Sequence[str] = ()) -> Demonstration:
    """Return a conversation of user and assistant in turn, after messages of the roles `before`."""
    roles = [*before, *(("user", "assistant")[i % 2] for i in range(len(turns) - len(before)))]
    messages = [{"role": role, "content": text} for role, text in zip(roles, turns, strict=True)]
    return parse_demonstration({"messages": messages}, "here")
