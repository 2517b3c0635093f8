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


class FreedMemory:
    """What the C library holds on to. Batches of ever new lengths leave a heap in pieces: glibc keeps what was freed
    between what was not, and a process grows for hours."""

    def __init__(self, growth: int = 1 << 30) -> None:
        self.growth = growth  # bytes; to give back more often costs as much as fresh pages do
        self.usual: int | None = None  # resident with what one round leaves

    def give_back(self) -> None:
        """To be called after each round of something, when most is free: once it has grown, what is free goes back."""
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        resident = _resident_bytes()
        if trim is None or resident is None:
            return
        if self.usual is None:
            self.usual = resident
        elif resident - self.usual > self.growth:
            trim(0)
            self.usual = None  # as the next round leaves it


def _resident_bytes() -> int | None:
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except OSError:
        return None
