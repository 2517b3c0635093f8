"""One run of the study: configuration, planning, the stages, and everything they compute with."""

import os
import sys
from types import TracebackType

__version__ = "0.2.0"

# Libraries that would write over our progress display, or warn about processes that they do not know of.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# torch reads this when it first allocates GPU memory. Micro-batches and caches of ever new sizes would otherwise leave
# gaps between blocks that no later one fits into. The second name is torch's older one.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def _exit_on_interrupt(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
    """Report Ctrl-C while a command imports its modules, before `report_errors` does."""
    if not issubclass(kind, KeyboardInterrupt):
        sys.__excepthook__(kind, error, trace)
        return
    print("\nInterrupted. Run the same command again.", file=sys.stderr, flush=True)
    os._exit(130)


if sys.argv[:1] == ["-m"]:  # Python is still looking for the module of the command
    sys.excepthook = _exit_on_interrupt
