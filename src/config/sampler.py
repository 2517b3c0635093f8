"""What `server=auto` stands for: vllm where it is installed, else none. Decided when a run is planned. No torch."""

from __future__ import annotations

import importlib.util
import shutil
from collections.abc import Iterable
from dataclasses import replace

from src.config.schema import Point, Server

AUTO = "auto"
_PROGRAM = "vllm"


def resolve_server(server: Server) -> Server:
    """Return the server that draws samples, in the place of `auto`.

    Samples of different programs have different identities: what is recorded, hashed and sent to jobs is never `auto`.
    """
    if server.name != AUTO:
        return server
    if _why_not_vllm() is None:
        return replace(server, name=_PROGRAM, is_automatic=True)
    return Server(name="none", is_automatic=True)


def describe_choice(points: Iterable[Point]) -> str | None:
    """Return a line that says which sampler `auto` stands for, and why; None when no point left it to that."""
    chosen = next((point.server.name for point in points if point.server.is_automatic), None)
    if chosen is None:
        return None
    if chosen == "none":
        reason = _why_not_vllm() or "vllm was not installed"
        return (
            f"server=auto: {reason}, so samples are drawn in the job, by transformers: the same as server=none. With "
            "vllm they would be other samples, in stages of their own"
        )
    return (
        "server=auto: vllm is installed, so its servers draw the samples: the same as server=vllm. server=none draws "
        "them in the job: other samples, in stages of their own"
    )


def _why_not_vllm() -> str | None:
    """Return what is missing here for vllm, which jobs use from the same environment; None when nothing is."""
    if importlib.util.find_spec(_PROGRAM) is None:
        return "vllm is not installed beside this Python"
    return None if shutil.which(_PROGRAM) is not None else "vllm is installed, but its program is not on PATH"
