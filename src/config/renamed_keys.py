"""Config keys and values of earlier versions that have new names: using one is an error that gives the new name."""

from __future__ import annotations

import re
from collections.abc import Sequence
from pathlib import Path

import yaml

from src.errors import ConfigError

_NEW_NAMES: dict[str, dict[str, str]] = yaml.safe_load(Path(__file__).with_suffix(".yaml").read_text(encoding="utf-8"))
RENAMED_KEYS, RENAMED_VALUES = _NEW_NAMES["keys"], _NEW_NAMES["values"]


def check_renamed(overrides: Sequence[str]) -> None:
    """Raise ConfigError for an override that uses a key or value of an earlier version."""
    for override in overrides:
        setting = override.lstrip("+~")
        key = setting.partition("=")[0]
        if new := new_name(key):
            raise ConfigError(f"{override}: the key {key} is called {new} now")
        if setting in RENAMED_VALUES:
            raise ConfigError(f"{override}: this is {RENAMED_VALUES[setting]} now")


def rename_hint(message: str) -> str:
    """Return a hint to append to an error of Hydra about an old key in a YAML file; empty for other errors."""
    place, argument = re.search(r"at key ([\w.]+)", message), re.search(r"unexpected keyword argument '(\w+)'", message)
    if place is None:
        return ""
    key = f"{place[1]}.{argument[1]}" if argument else place[1]
    new = new_name(key)
    return f"; the key {key} is called {new} now" if new else ""


def new_name(key: str) -> str | None:
    """Return what an old key, or one below it, is called now; None for any other key."""
    for old, new in RENAMED_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            return new + key.removeprefix(old)
    return None
