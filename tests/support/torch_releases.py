"""torch.nn.attention.varlen as other releases of torch have it."""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any
from unittest import mock

import yaml
from torch.nn.attention import varlen

SIGNATURES_FILE = Path(__file__).with_name("varlen_signatures.yaml")


@cache
def varlen_signatures() -> dict[str, inspect.Signature]:
    """Return torch's release -> the signature of its varlen_attn."""
    rows = yaml.safe_load(SIGNATURES_FILE.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for release, text in rows.items():
        exec(f"def signature{text}: ...", names)
        rows[release] = inspect.signature(names["signature"])
    return rows


@contextlib.contextmanager
def torch_of(release: str) -> Iterator[None]:
    """Give varlen_attn the signature that it has in this release of torch."""
    with mock.patch.object(varlen, "varlen_attn", _restricted(varlen.varlen_attn, varlen_signatures()[release])):
        yield


def _restricted(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    accepted = inspect.signature(function).parameters

    def restricted(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"varlen_attn() {error}") from None
        options = {name: value for name, value in bound.arguments.items() if name in accepted}
        if "enable_gqa" not in signature.parameters:  # there it always is
            options["enable_gqa"] = True
        return function(**options)

    restricted.__signature__ = signature  # type: ignore[attr-defined]
    return restricted
