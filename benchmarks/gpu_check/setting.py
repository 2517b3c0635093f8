"""Where a part runs, and the parts as the runner sees them."""

from __future__ import annotations

import importlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_check.results import Limit, Row

CPU = "CPU, tiny shape"
REHEARSED = "rehearsed on fake CUDA"


class NotHere(Exception):
    """Why a part cannot run here, through no fault of the code: it is skipped."""


@dataclass(frozen=True)
class Setting:
    """The device of a run and a folder for what a part writes. card: its name as torch reports it, None without one."""

    card: str | None
    out: Path

    @property
    def on_card(self) -> bool:
        return self.card is not None

    @property
    def device(self) -> torch.device:
        return torch.device("cuda" if self.on_card else "cpu")

    @property
    def where(self) -> str:
        return self.card or CPU

    def row(self, name: str, value: float, unit: str = "", limit: Limit | None = None, note: str = "") -> Row:
        """Return a row of what was computed on this device."""
        return Row(name, float(value), unit, self.where, limit, note)


def rehearsed(name: str, value: float, unit: str = "", limit: Limit | None = None, note: str = "") -> Row:
    """Return a row of what was rehearsed on fake CUDA tensors: bytes and counts are real, values and times are not."""
    return Row(name, float(value), unit, REHEARSED, limit, note)


@dataclass(frozen=True)
class Part:
    """A part of the check: a module of this package with a function `run(setting) -> list[Row]`.

    group: `correctness` or `speed`. without_card: what it does on a machine without a card. timeout: seconds, several
    times what it is expected to take.
    """

    name: str
    module: str
    group: str
    without_card: str = CPU
    timeout: float = 240

    @property
    def module_name(self) -> str:
        return f"benchmarks.gpu_check.{self.module}"

    @property
    def run(self) -> Callable[[Setting], list[Row]]:
        function: Any = importlib.import_module(self.module_name).run
        return function

    def where(self, setting: Setting) -> str:
        """Return what its line says it runs on."""
        return setting.card or self.without_card
