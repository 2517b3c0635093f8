"""Headers of weight files: names and shapes of the tensors without reading the tensors. No torch."""

from __future__ import annotations

import json
import struct
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

MAX_GGUF_ENTRIES = 10**7  # of metadata, of an array in it, and tensors: more means that the file is damaged

# GGUF's number of a metadata type -> struct format; 8 is text, 9 an array (ggml's docs/gguf.md).
_GGUF_NUMBERS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_GGUF_TEXT, _GGUF_ARRAY = 8, 9


class UnreadableWeights(Exception):
    """Why the header of a weight file cannot be read; the message begins with the file's name."""


def read_safetensors_header(file: Path) -> dict[str, dict[str, Any]]:
    """Return dtype, shape and data_offsets of every tensor of a safetensors file.

    The file is 8 bytes with the length of the header, the header as JSON, and the tensors without gaps. Raises
    UnreadableWeights for another format or length.
    """
    size = file.stat().st_size
    with file.open("rb") as handle:
        length = int.from_bytes(handle.read(8), "little")
        if size < 8 or length > size - 8:
            raise UnreadableWeights(f"{file.name} is cut off or not in the safetensors format ({size} bytes)")
        try:
            header = json.loads(handle.read(length))
            tensors = {name: dict(tensor) for name, tensor in header.items() if name != "__metadata__"}
            end = max((int(tensor["data_offsets"][1]) for tensor in tensors.values()), default=0)
            if not all(isinstance(tensor["dtype"], str) for tensor in tensors.values()):
                raise TypeError("a dtype is no text")
        except (ValueError, TypeError, AttributeError, LookupError, RecursionError):
            raise UnreadableWeights(f"{file.name} is not in the safetensors format") from None
    if 8 + length + end != size:
        raise UnreadableWeights(f"{file.name} has {size} of {8 + length + end} bytes: an interrupted download or copy")
    return tensors


@dataclass(frozen=True)
class GgufHeader:
    """metadata: key -> number, text, or list of them. shapes: tensor -> its shape, outermost dimension first."""

    metadata: dict[str, Any]
    shapes: dict[str, tuple[int, ...]]


def read_gguf_header(file: Path) -> GgufHeader:
    """Return the metadata and the shapes of the tensors of a GGUF file of version 2 or 3.

    The package gguf takes 2 s for a vocabulary of 49,152 tokens, and is an extra. Raises UnreadableWeights for another
    format or a file that ends inside the header.
    """
    try:
        with file.open("rb") as handle:
            magic, version, num_tensors, num_entries = struct.unpack("<4sIQQ", handle.read(24))
            if magic != b"GGUF" or version not in (2, 3) or max(num_tensors, num_entries) > MAX_GGUF_ENTRIES:
                raise ValueError("not GGUF")
            metadata = {}
            for _ in range(num_entries):
                key = _text(handle)
                metadata[key] = _value(handle, *_numbers(handle, "I"))
            shapes = {}
            for _ in range(num_tensors):
                name = _text(handle)
                (num_dimensions,) = _numbers(handle, "I")
                shapes[name] = tuple(reversed(_numbers(handle, "Q", num_dimensions)))
                _numbers(handle, "I"), _numbers(handle, "Q")  # type and offset
    except (struct.error, ValueError, KeyError, MemoryError, OverflowError, RecursionError):
        raise UnreadableWeights(f"{file.name} is cut off or not in the GGUF format") from None
    return GgufHeader(metadata, shapes)


def _numbers(handle: BinaryIO, kind: str, count: int = 1) -> tuple[Any, ...]:
    if count > MAX_GGUF_ENTRIES:
        raise ValueError(f"{count} numbers")
    layout = f"<{count}{kind}"
    return struct.unpack(layout, handle.read(struct.calcsize(layout)))


def _text(handle: BinaryIO) -> str:
    (length,) = _numbers(handle, "Q")
    if length > MAX_GGUF_ENTRIES:
        raise ValueError(f"a text of {length} bytes")
    text = handle.read(length)
    if len(text) < length:
        raise ValueError("the file ends inside a text")
    return text.decode("utf-8", errors="replace")


def _value(handle: BinaryIO, kind: int) -> Any:
    if kind == _GGUF_TEXT:
        return _text(handle)
    if kind != _GGUF_ARRAY:
        return _numbers(handle, _GGUF_NUMBERS[kind])[0]
    (inner,), (count,) = _numbers(handle, "I"), _numbers(handle, "Q")
    if inner in _GGUF_NUMBERS:
        return list(_numbers(handle, _GGUF_NUMBERS[inner], count))
    if count > MAX_GGUF_ENTRIES:
        raise ValueError(f"an array of {count}")
    return [_value(handle, inner) for _ in range(count)]
