"""Rows of a stage, one for each of its items, that all ranks compute together: each its share of the batches."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from src.distributed import JointWork, get_distributed
from src.store.attempt import Attempt
from src.store.part_files import PartFiles

Row = dict[str, Any]  # its values, and where rows are kept on disk `index`, `seconds` and `checksum`


class SharedRows:
    """Every rank makes one, computes the batches of its `share`, saves their rows, and gathers those of all ranks.

    Rows on disk are done for every later attempt, also one with another number of ranks.
    """

    def __init__(self, attempt: Attempt, name: str | None, report: Callable[[int], None]) -> None:
        """Read what earlier attempts have left, and report it.

        name: of the files among the attempt's checkpoints; None keeps rows in memory alone. report: called with the
        number of rows that are done, of all ranks together.
        """
        self._ranks, self._attempt, self._report = get_distributed(), attempt, report
        self._files = None if name is None else PartFiles(attempt.checkpoints, name)
        known = self._files.collect() if self._files is not None and self._ranks.is_main_process else {}
        self.known: dict[int, Row] = self._ranks.broadcast_object(known)
        self.share = self._ranks.share(self.known)
        self._work = JointWork(self._ranks, len(self.known))
        self._new: dict[int, Row] = {}
        attempt.prior_seconds = max((attempt.prior_seconds, *(row["seconds"] for row in self.known.values())))
        self.report()

    def save(self, rows: dict[int, Row]) -> None:
        """Keep rows of one batch, by index. Raises what `report` raises, and the error of a rank that has failed."""
        new = {index: row for index, row in rows.items() if index not in self.known}  # others of a batch may be known
        if self._files is not None:
            seconds = round(self._attempt.seconds, 3)
            new = {index: {"index": index, **row, "seconds": seconds} for index, row in new.items()}
            self._files.append(self._ranks.rank, new.values())
        self._new |= new
        self._report(self._work.advance(len(new)))

    def report(self) -> None:
        """Report how many rows are done: at the start, and when none has been for a while. Raises like `save`."""
        self._report(self._work.advance())

    def gather(self) -> dict[int, Row]:
        """Return all rows by index, on every rank, once all of them have finished their shares. Raises like `save`."""
        self._work.wait(self._report)
        rows = dict(self.known)
        for part in self._ranks.gather_objects(self._new):
            rows |= part
        return rows
