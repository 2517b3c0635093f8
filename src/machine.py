"""What this machine offers a run: CPU cores and GPUs, seen without importing torch."""

from __future__ import annotations

import contextlib
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
