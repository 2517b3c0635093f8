"""What this machine offers a run: CPU cores and GPUs, seen without importing torch."""

from __future__ import annotations

import contextlib
import ctypes
import os
from pathlib import Path


def cores() -> int:
    """CPU cores this process may use: its affinity, within a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def keep_memory() -> None:
    """Let this process keep what it frees. Otherwise the activations of every micro-batch go back to the system and are
    mapped anew, page by page, in the next one. Does nothing where the C library is not glibc."""
    with contextlib.suppress(OSError, AttributeError):
        library = ctypes.CDLL(None)
        # M_MMAP_THRESHOLD, of which older versions take 32 MiB at most; M_TRIM_THRESHOLD; M_TOP_PAD.
        if library.mallopt(-3, 2**30) or library.mallopt(-3, 2**25):
            library.mallopt(-1, 2**31 - 1)
            library.mallopt(-2, 2**26)


def visible_gpus() -> list[str]:
    """What to set CUDA_VISIBLE_DEVICES to for each GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [g for g in named.split(",") if g.strip() and g.strip() != "-1"]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(driver.iterdir())))] if driver.is_dir() else []
