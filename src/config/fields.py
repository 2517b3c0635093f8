"""Fields of the schema that carry, as metadata, which values they may have. No torch."""

from __future__ import annotations

import math
from dataclasses import Field, field
from typing import Any

from omegaconf import MISSING

from src.errors import ConfigError


def choice(*values: str | None, default: Any = MISSING) -> Any:
    """Return a dataclass field whose value is one of `values`."""
    return field(default=default, metadata={"choices": values})


def number(default: Any = MISSING, *, minimum: float = 0, above: float | None = None, maximum: float = math.inf) -> Any:
    """Return a dataclass field for a number >= minimum (or > above) and <= maximum; None if its type allows that."""
    lower = f">= {minimum:g}" if above is None else f"> {above:g}"
    upper = f" and <= {maximum:g}" if math.isfinite(maximum) else ""

    def contains(value: float) -> bool:
        above_low = value >= minimum if above is None else value > above
        return above_low and value <= maximum and math.isfinite(value)

    return field(default=default, metadata={"interval": lower + upper, "contains": contains})


def choices_of(schema: Any, name: str) -> tuple[str | None, ...]:
    """Return the values that a `choice` field of a schema class may have."""
    return schema.__dataclass_fields__[name].metadata["choices"]


def check_value(key: str, field: Field[Any], value: Any) -> None:
    """Raise ConfigError when a value is not among its field's choices, or outside its interval."""
    rule = field.metadata
    if "choices" in rule and value not in rule["choices"]:
        allowed = ", ".join("null" if choice is None else choice for choice in rule["choices"])
        raise ConfigError(f"{key}={value}: must be one of {allowed}")
    if "interval" in rule and value is not None and not rule["contains"](value):
        raise ConfigError(f"{key}={value:g}: must be {rule['interval']}")
