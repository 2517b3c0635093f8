"""No file of a study has a secret: values of this environment's secret variables, and what has the form of a key."""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator
from html import escape

from src.config.secrets import find_key, secrets_of_environment
from src.errors import ConfigError

TEXTS = (".json", ".jsonl", ".csv", ".md", ".tex", ".yaml", ".svg", ".html", "DONE")  # how names of text files end
OVERLAP = 512  # bytes of a piece that are looked at again with the next one, at least; no key is longer


class SecretCheck:
    """Looks for secrets in the files of a study, piece by piece as they are read."""

    def __init__(self) -> None:
        self._values = {
            form.encode(errors="surrogateescape"): name
            for name, value in secrets_of_environment().items()
            for form in (value, json.dumps(value)[1:-1], json.dumps(value, ensure_ascii=False)[1:-1], escape(value))
        }
        self._overlap = max(OVERLAP, max(map(len, self._values), default=0))

    def pieces(self, name: str, pieces: Iterable[bytes]) -> Iterator[bytes]:
        """Yield the pieces of a file, each once it has been looked at. Raises ConfigError naming file and line."""
        before, line = b"", 1
        for piece in pieces:
            text = before + piece
            if (found := self._find(name, text)) is not None:
                kind, start = found
                number = line + text[:start].count(b"\n")
                raise ConfigError(
                    f"{name}, line {number}: has {kind}, and a study has no secrets; remove it there first"
                )
            line += text[: -self._overlap].count(b"\n")
            before = text[-self._overlap :]
            yield piece

    def _find(self, name: str, text: bytes) -> tuple[str, int] | None:
        """Return what a text has, and where it starts; None without a secret."""
        for value, variable in self._values.items():
            if (start := text.find(value)) >= 0:
                return f"the value of ${variable}", start
        if name.endswith(TEXTS) and (key := find_key(text.decode(errors="replace"))) is not None:
            return f"what looks like a key or token ({key[:4]}...)", max(0, text.find(key.encode()))
        return None
