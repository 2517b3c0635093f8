"""Choose the parts, run them, and write the report."""

from __future__ import annotations

import argparse
import contextlib
import importlib
import shlex
import sys
import time
from typing import Any

from benchmarks.gpu_check import environment
from benchmarks.gpu_check.parts import PARTS
from benchmarks.gpu_check.report import write_report
from benchmarks.gpu_check.results import PartResult
from benchmarks.gpu_check.runner import in_process, run_parts
from benchmarks.gpu_check.setting import Part, Setting

MINUTES_ON_CARD = 6  # for each half


def chosen(options: argparse.Namespace) -> list[Part]:
    """Return the parts of the options. Raises SystemExit for an unknown name."""
    if unknown := set(options.only or ()) - {part.name for part in PARTS}:
        raise SystemExit(f"--only {sorted(unknown)[0]}: the parts are {', '.join(part.name for part in PARTS)}")
    of_group = [part for part in PARTS if options.part in ("all", part.group)]
    return [part for part in of_group if not options.only or part.name in options.only]


def time_limit(options: argparse.Namespace, parts: list[Part], on_card: bool) -> float | None:
    """Return the seconds for all parts; None for no limit, which is the default without a card."""
    if options.minutes is not None:
        return 60 * options.minutes
    return 60 * MINUTES_ON_CARD * len({part.group for part in parts}) if on_card else None


def preload(parts: list[Part]) -> None:
    """Import what the parts import, once for all the processes that are forked; an error is reported by its part."""
    for part in parts:
        with contextlib.suppress(Exception):
            importlib.import_module(part.module_name)


def check(options: argparse.Namespace) -> int:
    """Run the check and return its exit code."""
    parts = chosen(options)
    options.out.mkdir(parents=True, exist_ok=True)
    kind, device = in_process(environment.describe, options.out / "device.log", timeout=120)
    if kind != "value":
        raise SystemExit(f"torch cannot be asked for its devices: {device}")
    setting = Setting(device["card"], options.out.resolve())
    print(f"gpu_check on {device['card'] or 'a machine without a card'}: torch {device['torch']}", flush=True)
    preload(parts)
    started = time.monotonic()
    limit = time_limit(options, parts, setting.on_card)
    results = run_parts(parts, setting, limit, lambda line: print(line, flush=True))
    command = shlex.join(["python", "-m", "benchmarks.gpu_check", *sys.argv[1:]])
    print(write_report(results, device, command, options.out))
    return exit_code(results, device, time.monotonic() - started)


def exit_code(results: list[PartResult], device: dict[str, Any], seconds: float) -> int:
    """Print the verdict; return 0 when no part failed, else 1."""
    failed = [part.name for part in results if not part.ok]
    where = f"on {device['card']}" if device["card"] else "without a card"
    verdict = f"FAILED: {', '.join(failed)}" if failed else "passed"
    print(f"{verdict} {where}, {len(results)} parts, {seconds:.0f} s")
    return int(bool(failed))
