"""Stop this process (SIGSTOP) just before it writes to a file or folder for the Nth time; see `tests.support.kills`.

Python imports this at its start, as this folder is on PYTHONPATH.
"""

import os
import signal
import sys
from pathlib import PurePath
from typing import Any

PATTERN, writes_left = os.environ["STOP_PATTERN"], int(os.environ["STOP_NUMBER"])
WRITTEN = {"open": 0, "os.mkdir": 0, "os.rename": 1}  # audit events; which of their arguments is the path written to


def stop(event: str, arguments: tuple[Any, ...]) -> None:
    global writes_left
    if event not in WRITTEN or (event == "open" and "a" not in str(arguments[1])):
        return
    path = arguments[WRITTEN[event]]
    if isinstance(path, str | os.PathLike) and PurePath(path).match(PATTERN):
        writes_left -= 1
        if writes_left == 0:
            os.kill(os.getpid(), signal.SIGSTOP)


sys.addaudithook(stop)
