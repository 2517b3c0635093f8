"""Compile the CPU attention kernel. Exit code 1 when that fails; the project then runs without it."""

import sys

from src.model.cpu.kernels import NotBuiltError, build

try:
    print(f"CPU attention kernel: {build()}")
except NotBuiltError as error:
    print(f"CPU attention kernel not built, falling back to torch SDPA (slower): {error}")
    sys.exit(1)
