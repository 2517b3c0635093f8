"""Studies that were changed after they were packed."""

from __future__ import annotations

import zipfile
from collections.abc import Callable
from pathlib import Path


def edited(study: Path, target: Path, edits: dict[str, Callable[[str], str | None]]) -> Path:
    """Write a copy of a study.zip with some of its text files edited: name -> new content; None leaves a file out."""
    with zipfile.ZipFile(study) as source, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as copy:
        assert edits.keys() <= set(source.namelist())
        for entry in source.infolist():
            content: bytes | None = source.read(entry)
            if entry.filename in edits and content is not None:
                text = edits[entry.filename](content.decode())
                content = None if text is None else text.encode()
            if content is not None:
                copy.writestr(entry, content)
    return target
