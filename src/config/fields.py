"""Fields of the schema that carry, as metadata, which values they may have. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterator
from dataclasses import MISSING as NO_DEFAULT
from dataclasses import Field, dataclass, field, fields, is_dataclass
from functools import cache
from typing import Any, TypeVar, get_args, get_origin, get_type_hints

from omegaconf import MISSING

from src.errors import ConfigError

T = TypeVar("T")

LARGEST = 10**15  # of a number that has no smaller maximum of its own
MAX_SECONDS = 604_800  # a week
MAX_NAME_BYTES = 100  # a file system allows 255, of which extensions and numbers of ours need some


@dataclass(frozen=True)
class Interval:
    """The numbers >= minimum (or > above) and <= maximum (or < below)."""

    minimum: float | None
    above: float | None
    maximum: float | None
    below: float | None

    def __contains__(self, value: float) -> bool:
        return (
            math.isfinite(value)
            and (self.minimum is None or value >= self.minimum)
            and (self.above is None or value > self.above)
            and (self.maximum is None or value <= self.maximum)
            and (self.below is None or value < self.below)
        )

    def __str__(self) -> str:
        bounds = ((">=", self.minimum), (">", self.above), ("<=", self.maximum), ("<", self.below))
        return " and ".join(f"{sign} {number_text(bound)}" for sign, bound in bounds if bound is not None)


def choice(*values: str | bool | None, default: Any = MISSING) -> Any:
    """Return a dataclass field whose value is one of `values`."""
    return field(default=default, metadata={"choices": values})


def number(
    default: Any = MISSING,
    *,
    minimum: float = 0,
    above: float | None = None,
    maximum: float = LARGEST,
    below: float | None = None,
    default_factory: Callable[[], Any] | None = None,
) -> Any:
    """Return a dataclass field for finite numbers >= minimum (or > above) and <= maximum (or < below).

    The value is a number, None if its type allows that, or a list, tuple or dict of numbers.
    """
    interval = Interval(minimum if above is None else None, above, maximum if below is None else None, below)
    values: dict[str, Any] = {"default": NO_DEFAULT if default_factory else default}
    return field(**values, default_factory=default_factory or NO_DEFAULT, metadata={"interval": interval})


def random_seed(default: Any = 0) -> Any:
    """Return a dataclass field for the seed of a random generator: 31 bits, as every library accepts."""
    return number(default, maximum=2**31 - 1)


def folder_name(default: Any = MISSING) -> Any:
    """Return a dataclass field for a name that becomes part of the name of a folder or file."""
    return field(default=default, metadata={"name": True})


def added_field(spec: Any) -> Any:
    """Return a dataclass field as one that is younger than stores are: at its default, identities are as before."""
    default = spec.default if spec.default is not NO_DEFAULT else spec.default_factory()
    metadata = {**spec.metadata, "hashed_unless": default}
    return field(default=spec.default, default_factory=spec.default_factory, metadata=metadata)


def is_hashed(spec: Field[Any], value: Any) -> bool:
    """Return whether this value of a field is part of an identity."""
    return "hashed_unless" not in spec.metadata or value != spec.metadata["hashed_unless"]


def choices_of(schema: Any, name: str) -> tuple[str | bool | None, ...]:
    """Return the values that a `choice` field of a schema class may have."""
    return schema.__dataclass_fields__[name].metadata["choices"]


def number_text(value: float) -> str:
    """Return a number as a user would write it: exact, whole numbers without `.0`."""
    return str(int(value)) if math.isfinite(value) and value == int(value) and abs(value) < 1e16 else repr(value)


def yaml_text(choice: str | bool | None) -> str:
    """Return a choice as it is written in YAML and in overrides."""
    return "null" if choice is None else str(choice).lower() if isinstance(choice, bool) else choice


def check_value(key: str, field: Field[Any], value: Any) -> None:
    """Raise ConfigError when a value is missing, not among its field's choices, or outside its interval."""
    rule = field.metadata
    if isinstance(value, str) and value == MISSING:
        raise ConfigError(f"{key} has no value: add {key}=VALUE")
    if "choices" in rule and value not in rule["choices"]:
        allowed = ", ".join(yaml_text(choice) for choice in rule["choices"])
        raise ConfigError(f"{key}={value}: must be one of {allowed}")
    if rule.get("name") and value is not None:
        _check_name(key, value)
    if "interval" in rule:
        for place, number in _numbers(value):
            if number not in rule["interval"]:
                finite = "" if math.isfinite(number) else "a finite number "
                given = f"{key}{place}={number_text(number)}"
                raise ConfigError(f"{given}: must be {finite}{rule['interval']}")


def _check_name(key: str, value: str) -> None:
    if not re.fullmatch(r"\w[\w.=+-]*", value) or len(value.encode(errors="replace")) > MAX_NAME_BYTES:
        raise ConfigError(
            f"{key}={shortened(value)}: becomes a folder name: use letters, digits and . _ - = + (not first), "
            f"at most {MAX_NAME_BYTES} bytes"
        )


def _numbers(value: Any) -> Iterator[tuple[str, float]]:
    """Yield (place, number) of every number in a value; place: `.dpo[0]` for the first of the list under `dpo`."""
    if isinstance(value, bool | str) or value is None or is_dataclass(value):
        return
    if isinstance(value, int | float):
        yield "", value
        return
    items = value.items() if isinstance(value, dict) else enumerate(value)
    for index, item in items:
        prefix = f".{index}" if isinstance(value, dict) else f"[{index}]"
        yield from ((prefix + place, number) for place, number in _numbers(item))


def shortened(text: str, length: int = 120) -> str:
    """Return the text, cut where it is longer than a line of a terminal can show."""
    return text if len(text) <= length else f"{text[:length]}... ({len(text)} characters)"


@cache
def _types_of_fields(config_class: type) -> dict[str, Any]:
    return get_type_hints(config_class)


def _container(hint: Any) -> Any:
    """Return list or dict for the type of a field that is one, or may be null instead; else None."""
    return next((origin for origin in map(get_origin, (hint, *get_args(hint))) if origin in (list, dict)), None)


def typed_leaves(node: Any, prefix: str = "") -> Iterator[tuple[str, Field[Any], Any]]:
    """Yield (dotted key, field, value) of every leaf of a config. Raises ConfigError for a key not in the schema."""
    known = {f.name: f for f in fields(node)}
    for name in vars(node):
        if name not in known:  # `+key=value` adds even to a typed config
            raise ConfigError(f"{prefix}{name}: no such key; there are {', '.join(sorted(known))}")
    types = _types_of_fields(type(node))  # type: ignore[arg-type]  # mypy: a class is not hashable
    for name, spec in known.items():
        value = getattr(node, name)
        if is_dataclass(value):
            expected = [kind for kind in (types[name], *get_args(types[name])) if is_dataclass(kind)]
            if not isinstance(value, tuple(expected)):  # type: ignore[arg-type]
                raise ConfigError(f"{prefix}{name}: refers to a config of another type; set its keys one by one")
            yield from typed_leaves(value, f"{prefix}{name}.")
        elif isinstance(value, list) and value and all(map(is_dataclass, value)):
            for index, item in enumerate(value):
                yield from typed_leaves(item, f"{prefix}{name}.{index}.")
        elif isinstance(value, dict) and value and all(map(is_dataclass, value.values())):
            for key, item in value.items():
                yield from typed_leaves(item, f"{prefix}{name}.{key}.")
        elif (container := _container(types[name])) and value is not None and not isinstance(value, container):
            kind = "a list" if container is list else "a mapping"
            raise ConfigError(f"{prefix}{name}={shortened(str(value))}: must be {kind}")
        else:
            yield prefix + name, spec, value


def select_fields(cls: type[T], source: Any, **values: Any) -> T:
    """Return a dataclass whose fields are `values` and, for all others, the attributes of `source` with their names."""
    names = {f.name for f in fields(cls)} - values.keys()  # type: ignore[arg-type]
    return cls(**values, **{name: getattr(source, name) for name in names})
