"""One run of the study: configuration, planning, the stages, and everything they compute with."""

import os
import sys
from types import TracebackType

__version__ = "0.2.0"

# Libraries that would write over our progress display, or warn about processes that they do not know of.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")


def _exit_on_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report Ctrl-C while a command imports its modules, before `report_errors` does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("\nInterrupted. Run the same command again.", file=sys.stderr, flush=True)
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # Python is still looking for the module of the command
    sys.excepthook = _exit_on_interrupt
