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


def visible_gpus() -> list[str]:
    """What to set CUDA_VISIBLE_DEVICES to for each GPU."""
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [g for g in named.split(",") if g.strip() and g.strip() != "-1"]
    driver = Path("/proc/driver/nvidia/gpus")
    return [str(i) for i in range(len(list(driver.iterdir())))] if driver.is_dir() else []


_GROWTH = 1 << 30  # bytes: giving back too often costs as much as fresh pages do
_resident = 0  # after the last time


def give_back_freed_memory() -> None:
    """To be called where much is free. Batches of ever new lengths leave a heap in pieces: glibc holds on to what was
    freed between what was not, and a process grows for hours. Once it has, what is free goes back."""
    global _resident
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None and _resident_bytes() - _resident > _GROWTH:
        trim(0)
        _resident = _resident_bytes()


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
