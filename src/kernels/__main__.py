"""`python -m src.kernels`: compile them. That they cannot be is said, and no error: nothing depends on them."""

from src.kernels import NotBuiltError, build

try:
    print(f"compiled kernels: {build()}")
except NotBuiltError as error:
    print(f"no compiled kernels, so attention in float32 on a CPU is torch's, which is slower: {error}")
