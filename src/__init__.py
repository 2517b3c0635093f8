"""One run of the study: configuration, planning, the stages, and everything they compute with."""

import os
import signal
import sys
from types import FrameType

__version__ = "0.2.0"

# Libraries that would write over our progress display, or warn about processes that they do not know of.
os.environ.setdefault("TQDM_DISABLE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

# torch reads this when it first allocates GPU memory. Micro-batches and caches of ever new sizes would otherwise leave
# gaps between blocks that no later one fits into. The second name is torch's older one.
if "PYTORCH_CUDA_ALLOC_CONF" not in os.environ:
    os.environ.setdefault("PYTORCH_ALLOC_CONF", "expandable_segments:True")


def exit_on_interrupt(number: int, frame: FrameType | None) -> None:
    """Handle SIGINT (Ctrl-C) while a command imports its modules: print one line and exit with code 130.

    Raising KeyboardInterrupt would not be enough: a module that is being imported may catch it, or raise another
    exception in a `finally` block.
    """
    os.write(2, b"\nInterrupted. Run the same command again.\n")  # to stderr
    os._exit(130)


# Python leaves "-m" there until it has found the module to run. `report_errors` replaces this handler.
is_command = sys.argv[:1] == ["-m"]
if is_command and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
    signal.signal(signal.SIGINT, exit_on_interrupt)
