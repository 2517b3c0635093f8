"""Answers of judges, kept by content, so that no question is asked or paid for twice."""

from __future__ import annotations

import json
import os
import socket
import uuid
from collections import Counter
from contextlib import suppress
from pathlib import Path
from typing import Any

from src.planning.identity import JudgeInputs
from src.store.store import Store


class Answers:
    """All answers of one judge model in an output_dir: key (a digest of the question) -> answer, a JSON object.

    Every process appends lines to its own file and reads the files of the others, which needs no lock and therefore
    works on a network file system. A line that a dead process left half-written is skipped.
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._file = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._num_bytes_read: dict[Path, int] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.totals: Counter[str] = Counter()  # sum of every numeric field over the known answers

    @classmethod
    def of_judge(cls, judge: JudgeInputs, output_dir: Path) -> Answers:
        """Return those of the judge's model."""
        return cls(Store(output_dir).answers(judge.name, judge.model_name))

    def refresh(self) -> None:
        """Read what other processes have written since the last call."""
        for path in sorted(self._folder.glob("*.jsonl")):
            start = self._num_bytes_read.get(path, 0)
            if path == self._file or path.stat().st_size <= start:
                continue
            with path.open("rb") as handle:
                handle.seek(start)
                text = handle.read()
            end = text.rfind(b"\n") + 1  # the last line may still be in writing
            for line in text[:end].splitlines():
                with suppress(json.JSONDecodeError):  # cut off by a full disk, and continued by the next answer
                    row = json.loads(line)
                    self._remember(row["key"], row["answer"])
            self._num_bytes_read[path] = start + end

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Append an answer; it is on disk when this returns."""
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("a", encoding="utf-8") as handle:
            handle.write(json.dumps({"key": key, "answer": answer}, ensure_ascii=False) + "\n")
            handle.flush()
            os.fsync(handle.fileno())
        self._remember(key, answer)

    def _remember(self, key: str, answer: dict[str, Any]) -> None:
        if key not in self.known:
            self.known[key] = answer
            self.totals.update({name: value for name, value in answer.items() if isinstance(value, (int, float))})
