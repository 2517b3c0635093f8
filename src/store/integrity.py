"""Whether a finished stage still has the artifacts it was published with: DONE records their sizes and digests.

No torch.
"""

from __future__ import annotations

from collections.abc import Collection
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.errors import DamagedFile
from src.store.files import file_digest, read_checksummed_json, status_of

DONE = "DONE"
STAGE_FILE = "stage.json"
WEIGHTS_REMOVED = "WEIGHTS_REMOVED"  # marks a finished stage whose model was deleted by keep_checkpoints
WEIGHTS = "*.safetensors*"  # what is deleted then


def describe_files(folder: Path) -> dict[str, dict[str, Any]]:
    """Return path -> size and digest of every file below `folder`, as DONE records them."""
    return {
        path.relative_to(folder).as_posix(): _describe(path) for path in sorted(folder.rglob("*")) if path.is_file()
    }


def find_damage(folder: Path, identity: str, names: Collection[str] | None = None) -> str | None:
    """Return which file of a finished stage is damaged, and how; None when all are as they were published.

    names: the files to look at, by default all. A file is read once in a process while its status does not change.
    Raises OSError when the file system fails, which is no damage.
    """
    try:
        done = read_checksummed_json(folder / DONE)
    except FileNotFoundError:
        return None  # moved away since: then it is not finished
    except DamagedFile as error:
        return str(error)
    if done["identity"] != identity:
        return f"{folder / DONE}: damaged, it is that of {done['identity']}"
    for name, published in done["files"].items():
        if names is not None and name not in names:
            continue
        path = folder / name
        try:
            if path.stat().st_size != published["bytes"]:
                return f"{path}: damaged, it has {path.stat().st_size} bytes instead of {published['bytes']}"
            if _describe(path) != published:
                return f"{path}: damaged, its content is not what was published"
        except (FileNotFoundError, NotADirectoryError):
            if not (path.match(WEIGHTS) and (folder / WEIGHTS_REMOVED).exists()):
                return f"{path}: missing"
        except IsADirectoryError:
            return f"{path}: damaged, it is a folder"
        except DamagedFile as error:
            return str(error)
    return None


def _describe(path: Path) -> dict[str, Any]:
    status = status_of(path)
    return {"bytes": status[0], "xxh3": _digest(path, status)}


@lru_cache(maxsize=2**17)
def _digest(path: Path, status: tuple[int, ...]) -> str:
    """Return the digest of a file while it has this status."""
    return file_digest(path)
