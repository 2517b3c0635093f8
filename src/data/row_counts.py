"""How many rows the files of a local table have, from their footers or the length of their lines."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from pathlib import Path

MAX_BYTES_OF_LINES = 32 * 2**20  # read of a file of JSON lines; the number in a larger one is extrapolated


def count_rows(files: Sequence[str]) -> int | None:
    """Return the rows of Parquet, Arrow and JSON-lines files together; None when one is of another format."""
    counts = [_count(Path(file)) for file in files]
    return None if None in counts else sum(count for count in counts if count is not None)


def _count(file: Path) -> int | None:
    import pyarrow
    from pyarrow import ipc, parquet

    with suppress(OSError, pyarrow.ArrowInvalid):
        if file.suffix == ".parquet":
            return parquet.read_metadata(file).num_rows
        if file.suffix == ".arrow":
            with pyarrow.memory_map(str(file)) as source:
                return sum(batch.num_rows for batch in ipc.open_stream(source))
        if file.suffix in (".jsonl", ".json"):
            return _count_lines(file)
    return None


def _count_lines(file: Path) -> int | None:
    size = file.stat().st_size
    with file.open("rb") as handle:
        head = handle.read(MAX_BYTES_OF_LINES)
    if head.lstrip()[:1] == b"[":
        return None  # a list: its length is known once all of it is parsed
    lines = sum(bool(line.strip()) for line in head.split(b"\n"))
    return lines if size <= len(head) else round(lines * size / len(head))
