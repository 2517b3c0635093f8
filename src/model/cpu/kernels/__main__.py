"""`python -m src.model.cpu.kernels`: compile them. Exit code 1 when they cannot be; nothing depends on them."""

import sys

from src.model.cpu.kernels import NotBuiltError, build

try:
    print(f"compiled kernels: {build()}")
except NotBuiltError as error:
    print(f"no compiled kernels, so attention in float32 on a CPU is torch's, which is slower: {error}")
    sys.exit(1)
