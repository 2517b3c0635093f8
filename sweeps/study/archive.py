"""A study.zip: written from a sweep's folder and its store, checked, and unpacked again.

Inside it is as an output_dir: `sweeps/NAME/...` and `store/STAGE/ID/...`, and beside them study.json and README.
"""

from __future__ import annotations

import hashlib
import json
import lzma
import shutil
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import IO, Any

from src.config.paths import is_file
from src.config.validation import check_folder
from src.errors import ConfigError, DamagedFile
from src.store.files import atomic_open, has_valid_checksum, with_checksum
from src.store.sweep_folder import SweepFolder
from sweeps.study.contents import Content, StudyContents
from sweeps.study.description import SCHEMA, describe_study
from sweeps.study.secret_check import SecretCheck

STUDY_FILE, README_FILE = "study.json", "README"
SUFFIX = ".zip"
PIECE = 2**20  # bytes that are read at once
LARGE = 2**31  # bytes from which a file of a zip needs the format for large ones
TIME = (1980, 1, 1, 0, 0, 0)  # the earliest that a zip can have: equal studies are equal bytes
README = """\
{name}: a study made with alignment-sweep {version}, as an output folder: sweeps/{name}/report.html shows it.
study.json says what it was made from, and has the SHA-256 of every file. There are no model weights in it.

    python -m sweeps.reproduce study.zip     computes every table and figure again, and compares
    python -m sweeps.aggregate study.zip     compares it with other studies and sweeps
"""


def write_archive(folder: SweepFolder, path: Path) -> dict[str, Any]:
    """Pack a sweep with all that its results are made of, but no model, into one zip file; return its study.json.

    The file appears when it is complete and checked. Equal sweeps give equal bytes. Raises ConfigError for a sweep that
    cannot be packed, naming the file with a secret where there is one, and DamagedFile naming a damaged stage file.
    """
    contents = StudyContents(folder)
    description = describe_study(contents)
    if path.exists() and not path.is_file():
        raise ConfigError(f"{path}: is no file; name one, such as {path.parent / 'study.zip'}")
    check_folder("--out", str(path.absolute().parent))
    path.parent.mkdir(parents=True, exist_ok=True)
    secrets = SecretCheck()
    with atomic_open(path) as draft:
        with zipfile.ZipFile(draft, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
            digests = {
                name: _add_file(archive, name, content, secrets) for name, content in sorted(contents.files.items())
            }
            readme = README.format(name=folder.name, version=description["code"]["version"]).encode()
            digests[README_FILE] = _add_file(archive, README_FILE, readme, secrets)
            study = json.dumps(with_checksum({**description, "files": digests}), indent=1) + "\n"
            _add_file(archive, STUDY_FILE, study.encode(), secrets)
        with zipfile.ZipFile(draft) as archive:
            if changes := StudyArchive(path, archive).changes():
                raise DamagedFile(f"{path}: {changes[0]} while it was packed; run the same command again")
    return description


def _add_file(archive: zipfile.ZipFile, name: str, content: Content, secrets: SecretCheck) -> dict[str, Any]:
    """Write a file into the archive and return its size and SHA-256."""
    entry = zipfile.ZipInfo(name, TIME)
    entry.compress_type, entry.create_system, entry.external_attr = zipfile.ZIP_DEFLATED, 3, 0o644 << 16
    size = len(content) if isinstance(content, bytes) else content.stat().st_size
    digest, written = hashlib.sha256(), 0
    with archive.open(entry, "w", force_zip64=size >= LARGE) as target:
        for piece in secrets.pieces(name, _pieces(content)):
            digest.update(piece)
            written += target.write(piece)
    return {"bytes": written, "sha256": digest.hexdigest()}


def _pieces(content: Content) -> Iterator[bytes]:
    if isinstance(content, bytes):
        yield content
        return
    with content.open("rb") as file:
        yield from _read(file)


def _read(file: IO[bytes]) -> Iterator[bytes]:
    while piece := file.read(PIECE):
        yield piece


@dataclass
class UnpackedStudy:
    """A study in a folder. changes: one line for each file that is not as it was packed."""

    folder: SweepFolder
    description: dict[str, Any]
    changes: list[str]


class StudyArchive:
    """An open study.zip, whose names and study.json have been checked."""

    def __init__(self, path: Path, archive: zipfile.ZipFile) -> None:
        """Raise ConfigError when it is no study, or its study.json is damaged or of another version."""
        self.path, self.archive = path, archive
        entries = [entry for entry in archive.infolist() if not entry.is_dir()]
        self.entries = {entry.filename: entry for entry in entries}
        for name in self.entries:
            if not _is_safe(name):
                raise ConfigError(f"{path}: has a file {name!r}, outside of the folder it is unpacked into")
        if len(self.entries) < len(entries):
            raise ConfigError(f"{path}: damaged, it has two files of one name")
        self.description = self._describe()

    def _describe(self) -> dict[str, Any]:
        if STUDY_FILE not in self.entries:
            raise ConfigError(f"{self.path}: no {STUDY_FILE} in it; give a zip of python -m sweeps.pack")
        try:
            study = json.loads(b"".join(self._content(STUDY_FILE)))
        except (ValueError, RecursionError):
            study = None
        if isinstance(study, dict) and study.get("schema") != SCHEMA:
            written = study.get("schema")
            raise ConfigError(f"{self.path}: a study of another version (schema {written}, this one reads {SCHEMA})")
        is_whole = isinstance(study, dict) and has_valid_checksum(study)
        if not is_whole or not isinstance(study.get("name"), str) or not isinstance(study.get("files"), dict):
            raise DamagedFile(f"{self.path}: its {STUDY_FILE} was changed or is damaged; get the study again")
        self.record = f"sweeps/{study['name']}/{SweepFolder.RECORD}"
        if not _is_safe(self.record) or self.record not in self.entries:
            raise DamagedFile(f"{self.path}: damaged, it has no {self.record}; get the study again")
        return study

    def changes(self, target: Path | None = None) -> list[str]:
        """Return one line for each file that is not as study.json lists it; write all files below `target`, if given.

        Raises DamagedFile for what cannot be read.
        """
        lines = []
        listed = self.description["files"]
        for name in sorted(self.entries.keys() | listed.keys()):
            if name not in self.entries:
                lines.append(f"{name} is missing")
                continue
            digest = hashlib.sha256()
            output = None if target is None else _create(target / name)
            try:
                for piece in self._content(name):
                    digest.update(piece)
                    if output is not None:
                        output.write(piece)
            finally:
                if output is not None:
                    output.close()
            if name not in listed:
                lines += [f"{name} was added"] if name != STUDY_FILE else []
            elif digest.hexdigest() != listed[name]["sha256"]:
                lines.append(f"{name} was changed")
        return lines

    def _content(self, name: str) -> Iterator[bytes]:
        try:
            with self.archive.open(self.entries[name]) as file:
                yield from _read(file)
        except (zipfile.BadZipFile, zlib.error, lzma.LZMAError, EOFError, NotImplementedError, RuntimeError) as error:
            raise DamagedFile(f"{self.path}: {name}: damaged ({error}); get the study again") from None


def unpack(path: Path, target: Path) -> UnpackedStudy:
    """Unpack a study.zip into a folder, which is an output_dir then.

    Raises ConfigError for what is no study, or does not fit the disk, DamagedFile for one that cannot be read.
    """
    if not is_file("study", str(path)):
        reason = "is a folder" if path.is_dir() else "no such file"
        raise ConfigError(f"{path}: {reason}; give a zip of python -m sweeps.pack")
    target.mkdir(parents=True, exist_ok=True)
    try:
        with zipfile.ZipFile(path) as archive:
            study = StudyArchive(path, archive)
            size, free = sum(entry.file_size for entry in study.entries.values()), shutil.disk_usage(target).free
            if size > free:
                sizes = f"unpacked it takes {size / 2**20:,.0f} MiB, and {target} has {free / 2**20:,.0f}"
                raise ConfigError(f"{path}: {sizes}; set TMPDIR to a folder with more space")
            changes = study.changes(target)
    except zipfile.BadZipFile as error:
        raise ConfigError(f"{path}: damaged or no zip file ({error}); give a zip of python -m sweeps.pack") from None
    folder = SweepFolder((target / study.record).parent)
    return UnpackedStudy(folder, study.description, changes)


def _is_safe(name: str) -> bool:
    """Return whether a file of a zip stays below the folder that it is unpacked into, on any system."""
    path = PurePosixPath(name)
    return (
        name.isprintable() and not path.is_absolute() and not set("\\:").intersection(name) and ".." not in path.parts
    )


def _create(path: Path) -> IO[bytes]:
    path.parent.mkdir(parents=True, exist_ok=True)
    return path.open("wb")
