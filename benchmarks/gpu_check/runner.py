"""Run parts one after the other, each in a process of its own, so that none can end or slow down the others."""

from __future__ import annotations

import contextlib
import multiprocessing
import os
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from benchmarks.gpu_check.results import ERROR, SKIPPED, PartResult
from benchmarks.gpu_check.setting import NotHere, Part, Setting


def run_parts(
    parts: list[Part], setting: Setting, seconds: float | None, say: Callable[[str], None]
) -> list[PartResult]:
    """Run all parts and return their results; a part that fails, crashes or hangs does not end the others.

    seconds: for all of them together, after which the rest are not started and count as errors; None for no limit.
    """
    started, results = time.monotonic(), []
    for number, part in enumerate(parts, 1):
        label = f"[{number}/{len(parts)}] {part.name}"
        remaining = float("inf") if seconds is None else seconds - (time.monotonic() - started)
        say(f"{label}: started [{part.where(setting)}]")
        results.append(run_part(part, setting, min(part.timeout, remaining)))
        say(f"{label}: {results[-1].line()}")
    return results


def run_part(part: Part, setting: Setting, timeout: float) -> PartResult:
    """Run a part in a forked process and return its result, whatever happens to that process."""
    where, started = part.where(setting), time.monotonic()
    if timeout <= 0:
        return PartResult(part.name, part.group, where, ERROR, 0.0, message="not started: no time left (--minutes)")
    log = setting.out / f"{part.module}.log"
    shutil.rmtree(setting.out / part.module, ignore_errors=True)  # what an earlier run left would be resumed
    kind, content = in_process(lambda: part.run(setting), log, timeout)
    seconds = round(time.monotonic() - started, 1)
    if kind == "value":
        # Parts that rehearse say so in their rows; what a part ran on is what its rows ran on.
        places = list(dict.fromkeys(row.where for row in content)) or [where]
        return PartResult.of(part.name, part.group, "; ".join(places), seconds, content)
    status = SKIPPED if kind == "not here" else ERROR
    message = content if status == SKIPPED else f"{content} ({log})"
    return PartResult(part.name, part.group, where, status, seconds, message=message)


def in_process(function: Callable[[], Any], log: Path, timeout: float, *, own_group: bool = True) -> tuple[str, Any]:
    """Call a function in a forked process with its output in `log`.

    Returns ("value", what it returned), ("not here", why) or ("error", one line). This process must not have started
    CUDA, which a fork does not survive. own_group: what the function starts ends with it; not for a function that is
    itself called inside such a process, with which it has to end.
    """
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_call, args=(function, log, sender, own_group))
    process.start()
    sender.close()
    try:
        if not receiver.poll(timeout):
            return "error", f"not done after {timeout:.3g} s"
        kind, content = receiver.recv()
        return kind, content
    except EOFError:
        process.join()
        code = process.exitcode or 0
        return "error", f"its process ended by {signal.Signals(-code).name if code < 0 else f'exit code {code}'}"
    finally:
        if own_group:
            _kill_group(process.pid)
        process.kill()
        process.join()


def _call(function: Callable[[], Any], log: Path, sender: Connection, own_group: bool) -> None:
    if own_group:
        os.setsid()
    log.parent.mkdir(parents=True, exist_ok=True)
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", buffering=1, closefd=False)
    try:
        answer = "value", function()
    except NotHere as reason:
        answer = "not here", str(reason)
    except BaseException as error:
        traceback.print_exc()
        first = (str(error).strip().splitlines() or [""])[0]
        answer = "error", f"{type(error).__name__}: {first[:300]}"
    sender.send(answer)
    sender.close()


def _kill_group(pid: int | None) -> None:
    with contextlib.suppress(ProcessLookupError):
        if pid is not None:
            os.killpg(pid, signal.SIGKILL)
