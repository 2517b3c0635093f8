"""Files that readers see whole or not at all. No torch."""

from __future__ import annotations

import json
import os
import shutil
import socket
import uuid
from collections.abc import Collection, Iterable, Iterator
from pathlib import Path
from typing import Any

from src.errors import ConfigError, DamagedFile


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, and DamagedFile naming path and line for anything else."""
    return _parse_object(_read_bytes(path), path)


def read_versioned_json(path: Path, schema: int) -> dict[str, Any]:
    """Read a JSON object with the key `schema`. Raises like `read_json`, and ConfigError for another schema's."""
    content = read_json(path)
    if (written := content.get("schema", 1)) != schema:  # version 0.1 wrote none
        raise ConfigError(
            f"{path} was written by another version of this program (schema {written}, this one reads "
            f"{schema}): move the folder away and run again"
        )
    return content


def read_jsonl(path: Path, keys: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that `write_jsonl` wrote.

    Raises FileNotFoundError, and DamagedFile naming path and line for a line that is not an object with these keys.
    """
    for number, line in enumerate(_read_bytes(path).removesuffix(b"\n").split(b"\n"), start=1):
        row = _parse_object(line, path, number)
        if missing := [key for key in keys if key not in row]:
            raise DamagedFile(f"{path}, line {number}: damaged, it has no {missing[0]}")
        yield row


def _read_bytes(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror})") from error


def _parse_object(content: bytes, path: Path, line: int = 1) -> dict[str, Any]:
    try:
        value = json.loads(content)
    except json.JSONDecodeError as error:
        raise DamagedFile(f"{path}, line {line + error.lineno - 1}: damaged, not JSON ({error.msg})") from None
    except (ValueError, RecursionError) as error:  # not UTF-8, or numbers and nesting beyond the parser's limits
        raise DamagedFile(f"{path}, line {line}: damaged, not JSON ({error})") from None
    if not isinstance(value, dict):
        raise DamagedFile(f"{path}, line {line}: damaged, a JSON object is expected, not {type(value).__name__}")
    return value


def write_json(path: Path, value: Any) -> None:
    atomic_write(path, json.dumps(value, indent=1) + "\n")


def write_jsonl(path: Path, rows: Iterable[dict[str, Any]]) -> None:
    atomic_write(path, "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))


def atomic_write(path: Path, content: str | bytes) -> None:
    """Replace `path`: readers, also on other machines, see the old content or the new, never a part of it."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("wb") as handle:
            handle.write(content.encode() if isinstance(content, str) else content)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    finally:
        draft.unlink(missing_ok=True)


def is_full(folder: Path) -> bool:
    """Return whether the disk under `folder` has less than a megabyte left."""
    return shutil.disk_usage(folder).free < 2**20


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder` to disk, so that a rename afterwards cannot expose a partly written one."""
    for path in folder.rglob("*"):
        if path.is_file():
            with path.open("rb") as handle:
                os.fsync(handle.fileno())


def publish_folder(draft: Path, final: Path) -> None:
    """Rename a finished folder into place, unless another process has just published an equal one."""
    try:
        os.rename(draft, final)
    except OSError:
        if not final.exists():
            raise
