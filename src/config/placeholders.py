"""Placeholders of texts that users write: {NAME} alone, since Python's format strings can also read attributes."""

from __future__ import annotations

from collections.abc import Collection
from string import Formatter


def placeholders(text: str, allowed: Collection[str]) -> set[str]:
    """Return the names of the placeholders in a text. Raises ValueError for one that is not a plain {NAME} of these."""
    names = set()
    for _, name, spec, conversion in Formatter().parse(text):
        if name is None:
            continue
        if name not in allowed or spec or conversion:
            written = name + (f"!{conversion}" if conversion else "") + (f":{spec}" if spec else "")
            raise ValueError(f"{{{written}}} is no placeholder")
        names.add(name)
    return names
