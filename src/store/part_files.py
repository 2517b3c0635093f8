"""Rows that several processes compute together, on disk as soon as they are known: each process has its own file.

No torch.
"""

from __future__ import annotations

import contextlib
import json
import logging
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from src.store.files import has_valid_checksum, remove, with_checksum, write_jsonl

log = logging.getLogger(__name__)


class PartFiles:
    """`NAME.jsonl` of rank 0 and `NAME-RANK.jsonl` of the others, in one folder.

    A line is a JSON object with the `index` of its row and a checksum.
    """

    def __init__(self, folder: Path, name: str) -> None:
        self._folder, self._name = folder, name

    def path(self, rank: int) -> Path:
        return self._folder / (f"{self._name}-{rank}.jsonl" if rank else f"{self._name}.jsonl")

    def collect(self) -> dict[int, dict[str, Any]]:
        """Return the rows of earlier attempts, whatever number of processes wrote them, and keep them in one file.

        Rank 0 calls this before any process appends. Damaged lines are left out, such as a last one that a kill has cut
        off.
        """
        rows: dict[int, dict[str, Any]] = {}
        files = [self.path(0), *sorted(self._folder.glob(f"{self._name}-[0-9]*.jsonl"))]
        for file in files:
            for row in _read(file):
                rows.setdefault(row["index"], row)
        write_jsonl(files[0], rows.values())
        for file in files[1:]:
            remove(file)
        return rows

    def append(self, rank: int, rows: Iterable[dict[str, Any]]) -> None:
        """Write rows to the file of a process; they survive its end, however sudden."""
        lines = "".join(json.dumps(with_checksum(row)) + "\n" for row in rows)
        with self.path(rank).open("ab") as handle:
            handle.write(lines.encode())


def _read(file: Path) -> list[dict[str, Any]]:
    """Return the undamaged rows of a file; warn of others."""
    rows: list[dict[str, Any]] = []
    if not file.is_file():
        remove(file)  # a folder or a named pipe in its place
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for line in filter(None, lines):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and has_valid_checksum(row):
                rows.append(row)
    if num_damaged := sum(map(bool, lines)) - len(rows):
        log.warning("%s: %d damaged lines; those rows are computed again", file, num_damaged)
    return rows
