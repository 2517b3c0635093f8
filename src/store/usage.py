"""What stages took of the accelerators that processes held for them: the time in which they computed, and waiting."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

from src.errors import DamagedFile
from src.store.files import read_checksummed_json
from src.store.integrity import DONE
from src.store.store import StageName, Store, kind_of

KINDS = (
    "sft",
    "candidates",
    "pairs",
    "reference",
    "align",
    "generate",
    "capability",
    "judge",
    "evaluate",
)  # of stages, in the order of tables


@dataclass(frozen=True)
class Usage:
    """Seconds of all processes together, one accelerator each where there are any."""

    in_use: float = 0.0
    waiting: float = 0.0

    def __add__(self, other: Usage) -> Usage:
        return Usage(self.in_use + other.in_use, self.waiting + other.waiting)

    @property
    def text(self) -> str:
        """Hours: `1.2 + 0.3 waiting`."""
        return f"{self.in_use / 3600:.3g} + {self.waiting / 3600:.3g} waiting"


def usage_of(done: Mapping[str, Any]) -> Usage:
    """Return the usage of a stage from what its DONE says (`Attempt.duration`).

    A process waits while models and data are loaded, while rank 0 computes alone, and before the stage, while another
    process computes what this one needs. Stages of version 0.2 recorded none of these.
    """
    seconds, processes = done["seconds"], done.get("processes") or 1
    held = max(processes, done.get("held_processes") or 1)
    loading, alone, waited = (done.get(f"{name}_seconds") or 0.0 for name in ("loading", "alone", "waited"))
    in_use = processes * max(0.0, seconds - loading - alone) + alone
    return Usage(in_use, held * (waited + seconds) - in_use)


def usage_by_kind(store: Store, stages: Iterable[tuple[str, str]]) -> dict[str, Usage]:
    """Return kind -> usage of the finished ones of these stages, (role, identity), each counted once."""
    usage: dict[str, Usage] = {}
    for role, identity in sorted(set(stages)):
        kind = kind_of(role)
        if (one := _usage_in(store.dir(StageName(kind, identity)))) is not None:
            usage[kind] = usage.get(kind, Usage()) + one
    return {kind: usage[kind] for kind in KINDS if kind in usage}


def _usage_in(folder: Path) -> Usage | None:
    """Return the usage of the stage in a folder; None when it is not finished or its DONE is damaged."""
    try:
        return _read(folder / DONE, (folder / DONE).stat().st_mtime_ns)
    except (FileNotFoundError, NotADirectoryError, DamagedFile):
        return None


@lru_cache(maxsize=65_536)  # a status that is watched asks every few seconds
def _read(path: Path, mtime: int) -> Usage:
    return usage_of(read_checksummed_json(path))
