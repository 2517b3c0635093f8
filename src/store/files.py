"""Files that readers see whole or not at all. No torch."""

from __future__ import annotations

import contextlib
import errno
import glob
import hashlib
import json
import os
import shutil
import socket
import stat
import uuid
from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import xxhash

from src.errors import ConfigError, DamagedFile


def read_json(path: Path) -> dict[str, Any]:
    """Read a JSON object. Raises FileNotFoundError, and DamagedFile naming path and line for anything else."""
    return _parse_object(read_bytes(path), path)


def read_versioned_json(path: Path, schema: int) -> dict[str, Any]:
    """Read a JSON object with the key `schema`. Raises like `read_json`, and ConfigError for another schema's."""
    content = read_json(path)
    if (written := content.get("schema", 1)) != schema:  # version 0.1 wrote none
        raise ConfigError(
            f"{path} was written by another version of this program (schema {written}, this one reads "
            f"{schema}): move the folder away and run again"
        )
    return content


def read_checksummed_json(path: Path) -> dict[str, Any]:
    """Read what `with_checksum` returned. Raises like `read_json`, and DamagedFile when any value has changed since."""
    content = read_json(path)
    if not has_valid_checksum(content):
        raise DamagedFile(f"{path}: damaged, its checksum is not that of its content")
    return content


def with_checksum(value: dict[str, Any]) -> dict[str, Any]:
    """Return the JSON object with a checksum of its content, so that readers need not distrust its values."""
    return {**value, "checksum": _checksum(value)}


def has_valid_checksum(value: dict[str, Any]) -> bool:
    """Return whether a JSON object is as `with_checksum` returned it."""
    return value.get("checksum") == _checksum({key: v for key, v in value.items() if key != "checksum"})


def _checksum(value: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(value, sort_keys=True).encode())


def file_digest(path: Path) -> str:
    """Return a checksum against damage, not forgery: fast enough for the optimizer state of an 8B model.

    Raises OSError, and DamagedFile for a named pipe.
    """
    _refuse_pipe(path)
    with path.open("rb") as handle:
        return hashlib.file_digest(handle, xxhash.xxh3_128).hexdigest()


def status_of(path: Path) -> tuple[int, int, int, int]:
    """Return size, mtime, ctime (ns) and inode of a file: while all are the same, its content is.

    Size and mtime alone do not tell: archives and `rsync -t` restore the mtime, and all checkpoints of an
    architecture have one size.
    """
    status = path.stat()
    return status.st_size, status.st_mtime_ns, status.st_ctime_ns, status.st_ino


def read_jsonl(path: Path, keys: Collection[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield the rows of a file that `write_jsonl` wrote.

    Raises FileNotFoundError, and DamagedFile naming path and line for a line that is not an object with these keys.
    """
    for number, line in enumerate(read_bytes(path).removesuffix(b"\n").split(b"\n"), start=1):
        row = _parse_object(line, path, number)
        if missing := [key for key in keys if key not in row]:
            raise DamagedFile(f"{path}, line {number}: damaged, it has no {missing[0]}")
        yield row


def read_bytes(path: Path) -> bytes:
    """Read a file. Raises FileNotFoundError, and DamagedFile for what cannot be read, or is a named pipe."""
    try:
        _refuse_pipe(path)
        return path.read_bytes()
    except FileNotFoundError:
        raise
    except OSError as error:
        raise DamagedFile(f"{path}: cannot be read ({error.strerror})") from error


def _refuse_pipe(path: Path) -> None:
    """Raise DamagedFile for a named pipe, which would be waited for until somebody writes to it."""
    if stat.S_ISFIFO(path.stat().st_mode):
        raise DamagedFile(f"{path}: damaged, it is a named pipe")


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
    with atomic_open(path) as handle:
        handle.write(content.encode() if isinstance(content, str) else content)


@contextlib.contextmanager
def atomic_open(path: Path) -> Iterator[BinaryIO]:
    """Yield a file that replaces `path` when the body ends, as in `atomic_write`; none is left when the body raises."""
    draft = path.with_name(f".{path.name}.{socket.gethostname()}-{os.getpid()}-{uuid.uuid4().hex[:8]}")
    try:
        with draft.open("w+b") as handle:
            yield handle
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(draft, path)
    except OSError as error:
        if error.filename is None:  # a full disk is reported by a write, which does not know the file's name
            error.filename = str(path)
        raise
    finally:
        draft.unlink(missing_ok=True)


def find(folder: Path, pattern: str) -> list[Path]:
    """Return the paths below a folder that match; none below what is deleted meanwhile, where Path.glob raises."""
    return [folder / name for name in glob.glob(pattern, root_dir=folder)]


@dataclass(frozen=True)
class NumberedNames:
    """Names that consist of a prefix and a number of at least `width` digits, such as `step-00000012`."""

    prefix: str
    width: int

    def path(self, folder: Path, number: int) -> Path:
        return folder / f"{self.prefix}{number:0{self.width}d}"

    def entries(self, folder: Path) -> dict[int, Path]:
        """Return the entries of the folder that have such names, ascending; any other, as `step-abc`, is not ours."""
        entries: dict[int, Path] = {}
        for path in find(folder, f"{self.prefix}*"):
            with contextlib.suppress(ValueError):
                number = int(path.name.removeprefix(self.prefix))
                if path == self.path(folder, number):
                    entries[number] = path
        return dict(sorted(entries.items()))


def remove(path: Path) -> None:
    """Delete a file or a folder, as far as the file system permits."""
    with contextlib.suppress(OSError):
        path.unlink()
    shutil.rmtree(path, ignore_errors=True)


def is_full(folder: Path) -> bool:
    """Return whether the disk under `folder`, which may have been deleted, has less than a megabyte left."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free < 2**20


def fsync_file(path: Path) -> None:
    """Flush a file to disk, so that a rename of its folder afterwards cannot expose a partly written one."""
    with path.open("rb") as handle:
        os.fsync(handle.fileno())


def fsync_tree(folder: Path) -> None:
    """Flush every file below `folder` to disk, as `fsync_file` does."""
    for path in folder.rglob("*"):
        if path.is_file():
            fsync_file(path)


def publish_folder(draft: Path, final: Path) -> None:
    """Rename a finished folder into place, unless another process has just published an equal one."""
    try:
        os.rename(draft, final)
    except OSError as error:
        if error.errno not in (errno.ENOTEMPTY, errno.EEXIST):
            raise
