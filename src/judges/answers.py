"""What judges were asked and answered, kept by content, so that nothing is asked or paid for twice."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any


class Answers:
    """All answers of one model as a judge in an output_dir: key (a digest of the question) -> answer, a JSON object.

    Every process appends lines to a file of its own and reads those of the others, which needs no lock and therefore
    works on a network file system. A line that a dead process left half-written is not read.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._own = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._read: dict[Path, int] = {}  # bytes of each file that are known
        self.known: dict[str, dict[str, Any]] = {}
        self.totals: Counter[str] = Counter()  # of every number in them

    def refresh(self) -> None:
        """See what others have written since."""
        for path in sorted(self._folder.glob("*.jsonl")):
            begin = self._read.get(path, 0)
            if path == self._own or path.stat().st_size <= begin:
                continue
            with path.open("rb") as handle:
                handle.seek(begin)
                text = handle.read()
            whole = text.rfind(b"\n") + 1
            for line in text[:whole].splitlines():
                with suppress(json.JSONDecodeError):  # begun on a full disk, ended by the next one
                    row = json.loads(line)
                    self._remember(row["key"], row["answer"])
            self._read[path] = begin + whole

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """On disk when this returns."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._own.open("a") as handle:
            handle.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._remember(key, answer)

    def _remember(self, key: str, answer: dict[str, Any]) -> None:
        if key not in self.known:
            self.known[key] = answer
            self.totals.update({name: value for name, value in answer.items() if isinstance(value, (int, float))})
