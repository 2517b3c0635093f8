"""Answers of judges, kept by content, so that no question is asked or paid for twice."""

from __future__ import annotations

import json
import logging
import os
import re
import socket
import uuid
from collections import Counter
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from src.planning.content import digest, hashable
from src.planning.identity import JudgeInputs
from src.store.store import Store

log = logging.getLogger(__name__)

# field of an answer -> whether a value is one of it
Shape = Mapping[str, Callable[[Any], bool]]


def is_text(value: Any) -> bool:
    return isinstance(value, str) and not re.search("[\ud800-\udfff]", value)


def is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 2**53


def answers_folder(judge: JudgeInputs, output_dir: Path) -> Path:
    """Return the folder of the answers of a judge's model: of its whole name, or content, at its address."""
    key = digest(hashable([judge.model, judge.base_url, *filter(None, (judge.asked, judge.server))]))
    return Store(output_dir).answers(judge.name, judge.model_name, key)


class Answers:
    """All answers of one judge model in an output_dir: key (a digest of the question) -> answer, a JSON object.

    Every process appends lines to its own file and reads the files of the others, which needs no lock and therefore
    works on a network file system. A line without an answer of this shape, half-written or damaged, is skipped.
    """

    def __init__(self, folder: Path, shape: Shape) -> None:
        self._folder, self._shape = folder, shape
        self._file = folder / f"{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}.jsonl"
        self._num_bytes_read: dict[Path, int] = {}
        self.known: dict[str, dict[str, Any]] = {}
        self.totals: Counter[str] = Counter()  # sum of every numeric field over the known answers

    @classmethod
    def of_judge(cls, judge: JudgeInputs, output_dir: Path, shape: Shape) -> Answers:
        """Return those of the judge's model."""
        return cls(answers_folder(judge, output_dir), shape)

    def refresh(self) -> None:
        """Read what other processes have written since the last call."""
        for path in sorted(self._folder.glob("*.jsonl")):
            start = self._num_bytes_read.get(path, 0)
            try:
                if path == self._file or (size := path.stat().st_size) <= start:  # a named pipe's size is 0
                    continue
                self._num_bytes_read[path] = size
                with path.open("rb") as handle:
                    handle.seek(start)
                    text = handle.read()
            except OSError as error:
                log.warning("%s cannot be read (%s), its questions are asked again", path, error.strerror)
                continue
            end = text.rfind(b"\n") + 1  # the last line may still be in writing
            lines = text[:end].split(b"\n")[:-1]
            if skipped := sum(not self._read(line) for line in lines):
                log.warning(
                    "%s: %d of %d lines have no answer, their questions are asked again", path, skipped, len(lines)
                )
            self._num_bytes_read[path] = start + end

    def add(self, key: str, answer: dict[str, Any]) -> None:
        """Append an answer; it is on disk when this returns."""
        self.add_all({key: answer})

    def add_all(self, answers: Mapping[str, dict[str, Any]]) -> None:
        """Append answers by key; they are on disk when this returns."""
        # A half of a surrogate pair, from a judge that stopped inside an emoji, has no UTF-8: it becomes a `?`.
        lines = [
            json.dumps({"key": key, "answer": answer}, ensure_ascii=False, allow_nan=False).encode(errors="replace")
            for key, answer in answers.items()
        ]
        for line in lines:
            if not self._read(line):
                raise ValueError(f"not an answer with {', '.join(self._shape)}: {line[:200]!r}")
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._file.open("ab") as handle:
            handle.write(b"".join(line + b"\n" for line in lines))
            handle.flush()
            os.fsync(handle.fileno())

    def _read(self, line: bytes) -> bool:
        """Remember the answer of a line; return whether there is one."""
        try:
            row = json.loads(line)
            key, answer = row["key"], row["answer"]
            fits = isinstance(key, str) and all(check(answer[name]) for name, check in self._shape.items())
        except (ValueError, LookupError, TypeError, RecursionError):
            return False
        if fits and key not in self.known:
            self.known[key] = answer
            self.totals.update({name: value for name, value in answer.items() if is_number(value)})
        return fits
