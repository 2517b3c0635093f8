"""What this machine offers a run: CPU cores and GPUs, seen without importing torch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

_ROOT = Path("/")


def cores() -> int:
    """CPU cores this process may use: its affinity, within a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text().split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def cores_of_process(sharing: int) -> int:
    """CPU cores for one of `sharing` processes on this machine, at least 1.

    The tasks of a SLURM step already have cores of their own (`--cpus-per-task`), which are not divided again.
    """
    of_task = os.environ.get("SLURM_CPUS_PER_TASK")
    if of_task and int(os.environ.get("SLURM_NTASKS", "1")) > 1:
        return min(cores(), int(of_task))
    return max(1, cores() // sharing)


def release_accelerator() -> None:
    """Return memory that torch's allocator keeps for models that are gone to the CUDA driver."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def visible_gpus() -> list[str]:
    """What to set CUDA_VISIBLE_DEVICES to for each GPU.

    WSL2, gVisor and some containers have no /proc/driver/nvidia, so device files are counted where it is missing.
    """
    named = os.environ.get("CUDA_VISIBLE_DEVICES")
    if named is not None:
        return [g for g in named.split(",") if g.strip() and g.strip() != "-1"]
    driver = _ROOT / "proc/driver/nvidia/gpus"
    gpus = list(driver.iterdir()) if driver.is_dir() else list((_ROOT / "dev").glob("nvidia[0-9]*"))
    return [str(i) for i in range(len(gpus))]


class HeapTrimmer:
    """What the C library holds on to. Batches of ever new lengths leave a heap in pieces: glibc keeps what was freed
    between what was not, and a process grows for hours."""

    def __init__(self, growth: int = 1 << 30) -> None:
        self.growth = growth  # bytes; to give back more often costs as much as fresh pages do
        self.usual: int | None = None  # resident with what one round leaves

    def maybe_trim(self) -> None:
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
