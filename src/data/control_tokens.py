"""Text of users that spells a control token, such as `<|im_end|>`, stays text: only a chat template writes such tokens.

Texts that spell none, which is almost all, are tokenized exactly as the tokenizer does it.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from typing import Any

Render = Callable[[Sequence[dict[str, str]]], str]

# Stands after the first character of a control token that content spells. U+FDD0 is a noncharacter, which Unicode keeps
# for use inside programs; one that is in a text itself is removed.
MARK = "\ufdd0"

_CONVERSATION = [
    {"role": "user", "content": "a"},
    {"role": "assistant", "content": "b"},
    {"role": "user", "content": "c"},
]


class ControlTokens:
    """The control tokens of a tokenizer: those it calls special, and those that a template writes around messages.

    render: the chat template; None for plain text. end_tokens: others that end a response. Other added tokens
    (`<think>`, HTML tags, runs of blanks) are ordinary text to a model, and texts may have them.
    """

    def __init__(self, tokenizer: Any, render: Render | None = None, end_tokens: Sequence[str] = ()) -> None:
        self._tokenizer = tokenizer
        written = "" if render is None else _written_by(render)
        added = {token.content: token.special for token in tokenizer.added_tokens_decoder.values()}
        names = {name for name, special in added.items() if special or name in written} | {
            *tokenizer.all_special_tokens,
            *end_tokens,
        }
        longest_first = sorted((name for name in names if name.strip()), key=len, reverse=True)
        any_token = "|".join(map(re.escape, longest_first)) or "(?!)"
        self._ids = set(tokenizer.convert_tokens_to_ids(longest_first))
        self._token, self._spelled = re.compile(f"({any_token})"), re.compile(f"(?=(?:{any_token}))(.)", re.DOTALL)

    def are_in(self, text: str) -> bool:
        """Return whether a text spells a control token."""
        return self._token.search(text) is not None

    def mark(self, text: str) -> str:
        """Return content for a template, in which no control token is whole; `encode` knows what to do with it."""
        return self._spelled.sub(rf"\1{MARK}", text)

    def encode(self, text: str) -> list[int]:
        """Return the tokens of a rendered text: control tokens where they are whole, text where content is marked."""
        ids: list[int] = []
        ordinary = ""
        for piece in self._token.split(text) if MARK in text else [text]:  # text, control token, text, ..., text
            if MARK in piece:
                ids += [*self._encode(ordinary), *self._encode_as_text(piece)]
                ordinary = ""
            else:
                ordinary += piece
        return ids + self._encode(ordinary)

    def _encode(self, text: str, **options: bool) -> list[int]:
        return self._tokenizer(text, add_special_tokens=False, **options)["input_ids"]

    def _encode_as_text(self, marked: str) -> list[int]:
        ids = self._encode(marked.replace(MARK, ""), split_special_tokens=True)
        if self._ids.isdisjoint(ids):
            return ids
        # A control token that the tokenizer does not call special, or that its vocabulary also has as a piece of text.
        return [token for part in marked.split(MARK) for token in self._encode(part)]


def _written_by(render: Render) -> str:
    """Return a conversation as a template writes it; some templates take one message only."""
    for messages in (_CONVERSATION, _CONVERSATION[:1]):
        with suppress(Exception):  # whatever code in a template raises
            return render(messages)
    return ""
