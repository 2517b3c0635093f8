"""Stop this process (SIGSTOP), or slow it down, just before it writes to a path or imports a module.

Python imports this at its start, as this folder is on PYTHONPATH; see `tests.support.kills`.
"""

import os
import signal
import sys
import time
from pathlib import PurePath
from typing import Any

PATTERN = os.environ["STOP_PATTERN"]
writes_left = int(os.environ.get("STOP_NUMBER", "0"))
MARKER = os.environ.get("STOP_MARKER")
SECONDS = float(os.environ.get("STOP_SECONDS", "0"))
# Audit events, and which of their arguments is the path written to, or the module's name.
WRITTEN = {"open": 0, "os.mkdir": 0, "os.rename": 1, "import": 0}


def is_first() -> bool:
    """Return whether no process has stopped before; where there is no marker every process is the first."""
    if MARKER is None:
        return True
    try:
        os.close(os.open(MARKER, os.O_CREAT | os.O_EXCL))
    except FileExistsError:
        return False
    return True


def stop(event: str, arguments: tuple[Any, ...]) -> None:
    global writes_left
    if event not in WRITTEN or (event == "open" and "a" not in str(arguments[1])):
        return
    path = arguments[WRITTEN[event]]
    if isinstance(path, str | os.PathLike) and PurePath(path).match(PATTERN):
        time.sleep(SECONDS)
        writes_left -= 1
        if writes_left == 0 and is_first():
            os.kill(os.getpid(), signal.SIGSTOP)


sys.addaudithook(stop)
