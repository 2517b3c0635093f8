"""What a process settles with its machine before it computes."""

import platform
import subprocess
import sys

import pytest

FAULTS = """
import ctypes, resource, sys
ctypes.CDLL(None).prctl(41, 1, 0, 0, 0)  # PR_SET_THP_DISABLE: pages of one size
from src.machine import keep_memory
if sys.argv[1] == "keep":
    keep_memory()
def faults():
    return resource.getrusage(resource.RUSAGE_SELF).ru_minflt
block = bytearray(2**27)
del block
before = faults()
block = bytearray(2**27)
print(faults() - before)
"""


def page_faults(mode):
    done = subprocess.run([sys.executable, "-c", FAULTS, mode], capture_output=True, text=True, check=True)
    return int(done.stdout)


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="elsewhere nothing is changed")
def test_memory_that_was_freed_is_there_for_the_next_tensor_without_asking_the_system():
    assert page_faults("keep") < 1000
    assert page_faults("leave") > 10_000, "without it, every page is mapped anew"
