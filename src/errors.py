"""Errors that users can act on, and how a command turns any exception into one line and an exit code."""

from __future__ import annotations

import functools
import io
import logging
import os
import re
import signal
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from errno import EDQUOT, ENOSPC
from threading import current_thread, main_thread
from typing import Any

from hydra.errors import HydraException
from omegaconf.errors import InterpolationResolutionError, OmegaConfBaseException

from src import exit_on_interrupt

log = logging.getLogger(__name__)


class ConfigError(ValueError):
    """A request cannot be run; the message is one line that names the override or file, and what would be right."""


class DamagedFile(ConfigError):
    """A file that this program wrote cannot be read; the message names the path and, of JSON, the line."""


class StageError(RuntimeError):
    """A stage failed for a reason the user can act on; the message is one line."""


class SweepFailed(RuntimeError):
    """Some points of a sweep failed; the others are done and aggregated."""


@dataclass(frozen=True)
class PointFailure:
    """Why a point has no result."""

    state: str  # failed, cancelled
    reason: str


CONFIG_ERRORS = (ConfigError, HydraException, OmegaConfBaseException)
USER_FACING_ERRORS = (*CONFIG_ERRORS, StageError, SweepFailed)


@functools.cache
def warn(message: str) -> None:
    """Print a warning on stderr, once in a process."""
    print(f"warning: {message}", file=sys.stderr, flush=True)


def one_line(error: BaseException) -> str:
    """Return the message of an error on one line: of Hydra and OmegaConf with that of its causes.

    An error of ours is the whole message: what they wrap around it, and what it was raised from, helps nobody.
    """
    parts: list[str] = []
    for cause in _causes(error):
        if isinstance(cause, (ConfigError, StageError, SweepFailed)):
            return " ".join(str(cause).split("\n"))
        # Of the coordinates that OmegaConf appends, only the full key is useful to a user.
        lines = [line.strip() for line in str(cause).split("\n")]
        lines = [line for line in lines if line and not line.startswith(("object_type=", "reference_type="))]
        message = " ".join(lines).replace("full_key: ", "at key ")
        # Hydra suggests `+key=value`, which a typed config refuses as well, and points to documentation of syntax.
        message = re.sub(r"\. To append to your config use \+\S+| See https://hydra\.cc/\S+ for details", "", message)
        message = re.sub(r" Config search path:.*", "", message)
        message = re.sub(r"\b\w+ raised while resolving interpolation: ", "", message)
        if message and not any(message in part or part in message for part in parts):
            parts.append(message)
    return ": ".join(parts)


def _causes(error: BaseException) -> Iterator[BaseException]:
    """Yield an exception and those that it was raised from, or for, as OmegaConf raises errors of resolvers."""
    cause: BaseException | None = error
    while cause is not None:
        yield cause
        in_resolver = isinstance(cause, InterpolationResolutionError)
        cause = cause.__cause__ or (cause.__context__ if in_resolver else None)


def describe_failure(error: BaseException) -> str:
    """Return one line for any exception: a user-facing message as it is, any other with the name of its type."""
    if isinstance(error, USER_FACING_ERRORS):
        return one_line(error)
    if isinstance(error, OSError) and error.strerror:
        hint = "; free some space and run the same command again" if error.errno in (ENOSPC, EDQUOT) else ""
        return (f"{os.fsdecode(error.filename)}: " if error.filename else "") + error.strerror + hint
    text = " ".join(str(error).split())
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def printable(text: str) -> str:
    """Return the text with what would break or recolor a line of a terminal written as an escape."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in text)


def _tolerate_any_text() -> None:
    """Let stdout and stderr write what their encoding lacks as an escape: no result is lost to a `±`."""
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


_was_interrupted = False


def _interrupt(number: int, frame: Any) -> None:
    global _was_interrupted
    _was_interrupted = True
    raise KeyboardInterrupt


def _interrupted() -> SystemExit:
    print("\nInterrupted. Run the same command again to resume.", file=sys.stderr)
    return SystemExit(130)


@contextmanager
def report_errors() -> Iterator[None]:
    """Turn an exception into one line on stderr and an exit code.

    The codes are 1 for a failed run, 2 for a wrong request and 130 for an interruption. Only what is neither a user's,
    a file system's nor an endpoint's doing has a traceback before its line.
    """
    global _was_interrupted
    _was_interrupted = False
    _tolerate_any_text()
    # A handler that somebody else has set stays, and so does SIG_IGN, which nohup and shell scripts set.
    is_replaceable = signal.getsignal(signal.SIGINT) in (signal.default_int_handler, exit_on_interrupt)
    if is_replaceable and current_thread() is main_thread():
        signal.signal(signal.SIGINT, _interrupt)
    logging.raiseExceptions = False  # a log that a full disk refuses is not worth a traceback
    try:
        yield
    except KeyboardInterrupt:
        raise _interrupted() from None
    except CONFIG_ERRORS as error:
        print(f"error: {printable(one_line(error))}", file=sys.stderr)
        raise SystemExit(2) from error
    except BrokenPipeError:  # stdout is a pipe whose reader has exited
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        raise SystemExit(1) from None
    except Exception as error:
        if _was_interrupted:  # during an import in a C extension, which fails in its own way
            raise _interrupted() from None
        if not isinstance(error, (*USER_FACING_ERRORS, OSError)):
            traceback.print_exc()
        if any(isinstance(handler, logging.FileHandler) for handler in logging.root.handlers):
            log.info("failed", exc_info=error)  # to the log file of a run; in a sweep Hydra's logs go to the console
        print(f"failed: {printable(describe_failure(error))}", file=sys.stderr)
        raise SystemExit(1) from error
