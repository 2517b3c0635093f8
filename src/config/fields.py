"""Fields of the schema that carry, as metadata, which values they may have. No torch."""

from __future__ import annotations

import math
from dataclasses import Field, dataclass, field
from typing import Any

from omegaconf import MISSING

from src.errors import ConfigError


@dataclass(frozen=True)
class Interval:
    """The numbers from `low` (itself included or not) to `high`, without infinity and NaN."""

    low: float
    includes_low: bool
    high: float

    def __contains__(self, value: float) -> bool:
        above_low = value >= self.low if self.includes_low else value > self.low
        return above_low and value <= self.high and math.isfinite(value)

    def __str__(self) -> str:
        upper = f" and <= {self.high:g}" if math.isfinite(self.high) else ""
        return f"{'>=' if self.includes_low else '>'} {self.low:g}{upper}"


def choice(*values: str | None, default: Any = MISSING) -> Any:
    """Return a dataclass field whose value is one of `values`."""
    return field(default=default, metadata={"choices": values})


def number(default: Any = MISSING, *, minimum: float = 0, above: float | None = None, maximum: float = math.inf) -> Any:
    """Return a dataclass field for a number >= minimum (or > above) and <= maximum; None if its type allows that."""
    interval = Interval(minimum, True, maximum) if above is None else Interval(above, False, maximum)
    return field(default=default, metadata={"interval": interval})


def choices_of(schema: Any, name: str) -> tuple[str | None, ...]:
    """Return the values that a `choice` field of a schema class may have."""
    return schema.__dataclass_fields__[name].metadata["choices"]


def check_value(key: str, field: Field[Any], value: Any) -> None:
    """Raise ConfigError when a value is not among its field's choices, or outside its interval."""
    choices, interval = field.metadata.get("choices"), field.metadata.get("interval")
    if choices is not None and value not in choices:
        raise ConfigError(f"{key}={value}: must be one of {', '.join('null' if c is None else c for c in choices)}")
    if interval is not None and value is not None and value not in interval:
        raise ConfigError(f"{key}={value:g}: must be {interval}")
