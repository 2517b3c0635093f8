"""Reading best.yaml: the values of beta and lr that `best_from=FILE` takes from an earlier sweep. No torch."""

from __future__ import annotations

import json
import math
import stat
from dataclasses import dataclass, field
from functools import lru_cache
from pathlib import Path
from typing import Any

import yaml

from src.config.fields import shortened
from src.config.renamed_keys import new_name
from src.errors import ConfigError

MAX_BYTES = 2**24  # of a best.yaml, which has some hundred bytes for each method
_SET = "set beta=VALUE and lr=VALUE"
_CURE = f"give the best.yaml of a sweep (OUTPUT_DIR/sweeps/NAME/best.yaml), or {_SET}"


@dataclass(frozen=True)
class BestValues:
    """The best values of one method, and the settings that they were tuned with."""

    beta: float
    lr: float
    settings: dict[str, Any] = field(default_factory=dict)  # config key -> value
    # Of a sweep before version 0.3: settings as words KEY=VALUE, whose values are text without spaces.
    words: dict[str, str] = field(default_factory=dict)


def read_best_values(file: str, setup: str, method: str) -> BestValues:
    """Return the entry of a method in best.yaml. Raises ConfigError naming `best_from=FILE`, the entry and the cure."""
    where = f"best_from={file}"
    table = _read(file)
    if setup not in table:
        raise ConfigError(f"{where} has no best values for setup={setup}; it has those of {', '.join(map(str, table))}")
    methods = table[setup]
    if not isinstance(methods, dict):
        raise ConfigError(f"{where}: {setup} must have an entry for each method; {_CURE}")
    if method not in methods:
        raise ConfigError(f"{where} has no best values for setup={setup} method={method}: {_SET}")
    entry, place = methods[method], f"{where}: {setup}.{method}"
    if not isinstance(entry, dict):
        raise ConfigError(f"{place} must have the entries beta and lr; {_CURE}")
    settings, variant, init = entry.get("settings") or {}, entry.get("variant") or "", entry.get("init") or ""
    if not isinstance(settings, dict) or not all(isinstance(key, str) for key in settings):
        raise ConfigError(f"{place}.settings must map config keys to values; {_CURE}")
    if not isinstance(variant, str) or not isinstance(init, str):
        raise ConfigError(f"{place}.{'init' if isinstance(variant, str) else 'variant'} must be a text; {_CURE}")
    words = {} if "settings" in entry else dict(word.partition("=")[::2] for word in variant.split())
    if init:
        settings = {"init.name": init, **settings}
    renamed = {new_name(key) or key: text for key, text in words.items()}
    return BestValues(_number(entry, "beta", place), _number(entry, "lr", place), settings, renamed)


def _read(file: str) -> dict[Any, Any]:
    try:
        status = Path(file).stat()
        if not stat.S_ISREG(status.st_mode):
            raise ConfigError(f"best_from={file}: not a regular file; {_CURE}")
        return _parse(file, status.st_ino, status.st_mtime_ns, status.st_size)
    except FileNotFoundError:
        raise ConfigError(f"best_from={file}: no such file; {_CURE}") from None
    except OSError as error:
        raise ConfigError(f"best_from={file}: cannot be read ({error.strerror}); {_CURE}") from None
    except ValueError as error:
        if isinstance(error, ConfigError):
            raise
        raise ConfigError(f"best_from={file}: cannot be read ({error}); {_CURE}") from None


@lru_cache(maxsize=16)
def _parse(file: str, inode: int, mtime_ns: int, size: int) -> dict[Any, Any]:
    """Parse the file; once while it is unchanged, since every point of a sweep asks for its own entry."""
    if size > MAX_BYTES:
        raise ConfigError(f"best_from={file}: too large for a best.yaml; {_CURE}")
    try:
        table = yaml.safe_load(Path(file).read_bytes().decode("utf-8-sig"))
    except (yaml.YAMLError, RecursionError, UnicodeDecodeError) as error:
        mark = getattr(error, "problem_mark", None)
        line = "" if mark is None else f", line {mark.line + 1}"
        raise ConfigError(f"best_from={file}{line}: not YAML in UTF-8; {_CURE}") from None
    if not isinstance(table, dict) or not table:
        raise ConfigError(f"best_from={file}: has no entry for any setup; {_CURE}")
    return table


def _number(entry: dict[str, Any], name: str, place: str) -> float:
    given = entry.get(name)
    try:
        value = math.nan if given is None or isinstance(given, bool) else float(given)  # 1e-3 is a text in YAML 1.1
    except (TypeError, ValueError, OverflowError):
        value = math.nan
    if not (math.isfinite(value) and value > 0):
        text = shortened(json.dumps(given, default=str)) if name in entry else "missing"
        raise ConfigError(f"{place}.{name} must be a finite number > 0, not {text}; correct it, or set {name}=VALUE")
    return value
