"""Errors of composing a config, in one line that begins with the override. No torch."""

from __future__ import annotations

import re
import traceback
from collections.abc import Iterator, Sequence
from dataclasses import fields, is_dataclass
from typing import Any, get_args, get_type_hints

from hydra.errors import MissingConfigException
from omegaconf.errors import ConfigAttributeError, ConfigKeyError

from src.config.fields import shortened
from src.config.overrides import GRID_KEYWORDS, decode_keywords, did_you_mean
from src.config.renamed_keys import RENAMED_VALUES, rename_hint
from src.config.schema import Point
from src.config.secrets import conceal_secrets
from src.errors import one_line

OPTIONAL_TABLES = ("dataset.sft", "dataset.preference")  # null where a dataset has no table


def explain(error: BaseException, overrides: Sequence[str]) -> str:
    """Return one line for an error of composing these overrides; it begins with the override that caused it."""
    message = conceal_secrets(one_line(error))
    if isinstance(error, MissingConfigException) and error.missing_cfg_file and error.options is not None:
        group, _, name = error.missing_cfg_file.rpartition("/")
        cause = _override_of(group, overrides) or error.missing_cfg_file
        known = f"; there are {', '.join(error.options)}" if error.options else ""
        if renamed := RENAMED_VALUES.get(f"{group}={name}"):
            return f"{cause}: this is {renamed} now{known}"
        return f"{cause}: {group}/{name} does not exist{did_you_mean(name, list(error.options))}{known}"
    unknown = error.__cause__
    if isinstance(unknown, ConfigAttributeError | ConfigKeyError) and isinstance(unknown.full_key, str):
        if hint := rename_hint(message):
            return message + hint
        key, inside = unknown.full_key, re.match(r"Could not override '([^']+)'", message)
        if inside and not key.startswith(inside[1].partition(".")[0]):
            key = f"{inside[1]}.{key}"  # of an item of a list, which does not know where it is
        return f"{_override_of(key, overrides) or key}: there is no key {key}{_similar_key(key)}"
    if (merged := re.match(r"Error merging override (([^=]+)=.*?): ", message)) is not None:
        override, key = merged[1], merged[2].lstrip("+")
        reason = message[merged.end() :].removesuffix(f" at key {key}")
        keywords = [keyword.partition("=")[2] for keyword in GRID_KEYWORDS if keyword.startswith(f"{key}=")]
        hint = did_you_mean(override.partition("=")[2], keywords)
        return f"{shortened(override)}: {shortened(reason, 400)}{hint}{rename_hint(message)}"
    message += (renamed := rename_hint(message))
    if (called := re.search(r"unexpected keyword argument '(\w+)'.* at key ([\w.]+)", message)) is not None:
        key = f"{called[2]}.{called[1]}"
        return f"{_override_of(key, overrides) or key}: there is no key {key}{renamed}"
    if (repeated := re.match(r"Multiple values for ([\w@./]+)\.", message)) is not None:
        group = repeated[1]
        return (
            f"{_override_of(group, overrides) or group}: there is a choice of {group} already; give {group}=NAME once"
        )
    named = re.match(r"Could not override '([^']+)'", message)
    cause = _override_of(named[1], overrides) if named else next((o for o in overrides if f"'{o}'" in message), None)
    message = shortened(message, 1000)
    return f"{cause}: {message}" if cause and not message.startswith(cause) else message


def is_of_composition(error: BaseException) -> bool:
    """Return whether an exception was raised while Hydra composed, whose assertions some overrides run into."""
    frames = (frame for frame, _ in traceback.walk_tb(error.__traceback__))
    return any(frame.f_code.co_name in ("compose_config", "load_sweep_config") for frame in frames)


def explain_assertion(overrides: Sequence[str]) -> str:
    """Return one line for overrides that Hydra or OmegaConf composes neither, nor says why not."""
    for override in decode_keywords(overrides):
        key = override.partition("=")[0].lstrip("+~")
        for table in OPTIONAL_TABLES:
            if key == table or key.startswith(f"{table}."):
                return (
                    f"{shortened(override)}: {table} is null here or has no such value; see the tables in conf/dataset"
                )
    expressions = [override for override in overrides if "${" in override]
    return f"{' '.join(map(shortened, expressions or overrides))}: cannot be composed; check types and nesting"


def _override_of(key: str, overrides: Sequence[str]) -> str | None:
    """Return the last override of a key, of a group or of something below it, as it was typed."""
    for override in reversed(decode_keywords(overrides)):
        name = override.partition("=")[0].lstrip("+~")
        if key in (name, name.partition("@")[0]) or name.startswith(f"{key}.") or key.startswith(f"{name}."):
            return shortened(override)
    return None


def _similar_key(key: str) -> str:
    """Return a hint about the key of the schema that is most like an unknown one, whatever comes below it."""
    known = list(_keys(Point))
    if hint := did_you_mean(key, known):
        return hint
    last = key.rpartition(".")[2]
    return did_you_mean(last, [name for name in known if "." not in name] or known)


def _keys(schema: Any, prefix: str = "") -> Iterator[str]:
    """Yield the dotted key of every field of the schema, groups included."""
    hints = get_type_hints(schema)
    for f in fields(schema):
        yield prefix + f.name
        nested = next((kind for kind in (hints[f.name], *get_args(hints[f.name])) if is_dataclass(kind)), None)
        if nested is not None and not hasattr(hints[f.name], "__origin__"):
            yield from _keys(nested, f"{prefix}{f.name}.")
