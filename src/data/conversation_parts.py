"""What a conversation may hold that no template here writes: tools and thoughts. Rows that have them are refused."""

from __future__ import annotations

from typing import Any

from src.errors import ConfigError

# By the names that public tables and chat APIs have for them: roles of messages, and columns or fields of messages.
_TOOLS = "tools"
_THINKING = "thinking"
_ROLES = {
    **dict.fromkeys(("tool", "tools", "function", "function_call", "function_response", "observation"), _TOOLS),
    **dict.fromkeys(("tool_call", "tool_calls", "tool_response", "ipython"), _TOOLS),
    **dict.fromkeys(("thinking", "thought", "reasoning", "analysis"), _THINKING),
}
_FIELDS = {
    **dict.fromkeys(("tools", "functions", "tool_calls", "tool_call_id", "function_call"), _TOOLS),
    **dict.fromkeys(("thinking", "reasoning", "reasoning_content"), _THINKING),
}
_NOTHING: tuple[object, ...] = (None, "", "[]", "{}", "null", [], {})  # what tables hold in the rows that have none


def refuse_tools_and_thinking(row: dict[str, Any], where: str, *, is_message: bool) -> None:
    """Raise ConfigError naming `where` for a row, or one of its messages, with tools or thoughts.

    Left out, what remains would be another conversation: an answer to a tool's result that is not there.
    """
    role = row.get("role", row.get("from")) if is_message else None
    kind, what = _ROLES.get(role) if isinstance(role, str) else None, f"role {role!r}"
    if kind is None:
        name = next((name for name in _FIELDS if row.get(name) not in _NOTHING), None)
        # A column of a table may have any of the other names; these two are what chat templates are given.
        if name is not None and (is_message or name in ("tools", "functions")):
            kind, what = _FIELDS[name], f"{'field' if is_message else 'column'} {name!r}"
    if kind is not None:
        raise ConfigError(
            f"{where}: {what}: conversations with {kind} are not supported; drop these rows, or write what they hold "
            "into the content of user and assistant messages"
        )
