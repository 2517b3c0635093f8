"""CPU cores, GPUs and memory of this machine, without importing torch."""

from __future__ import annotations

import contextlib
import ctypes
import gc
import os
from pathlib import Path

from src.environment import read_integer
from src.errors import ConfigError

_ROOT = Path("/")


def cores() -> int:
    """Return the number of CPU cores this process may use: its affinity, within a container's quota."""
    count = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    with contextlib.suppress(OSError, ValueError):
        quota, period = Path("/sys/fs/cgroup/cpu.max").read_text(encoding="utf-8").split()
        if quota != "max":
            count = min(count, max(1, int(quota) // int(period)))
    return count


def cores_of_process(sharing: int) -> int:
    """Return the number of CPU cores for one of `sharing` processes on this machine, at least 1.

    The tasks of a SLURM step already have their own cores (`--cpus-per-task`), which are not divided again.
    """
    cpus_per_task = read_integer("SLURM_CPUS_PER_TASK", 0)
    if cpus_per_task and read_integer("SLURM_NTASKS", 1) > 1:
        return min(cores(), cpus_per_task)
    return max(1, cores() // sharing)


def check_num_threads(configured: int | None) -> None:
    """Raise ConfigError for more threads of a process than cores: they slow each other down, or do not start."""
    if configured is not None and configured > (available := cores()):
        raise ConfigError(
            f"engine.cpu_threads={configured}: this machine has {available} cores; use at most so many, or null for all"
        )


def release_accelerator() -> None:
    """Free the memory that torch's CUDA allocator has cached for models that no longer exist."""
    import torch

    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def visible_gpus() -> list[str]:
    """Return the value of CUDA_VISIBLE_DEVICES that selects each GPU.

    WSL2, gVisor and some containers have no /proc/driver/nvidia, so device files are counted where it is missing.
    """
    visible = os.environ.get("CUDA_VISIBLE_DEVICES")
    if visible is not None:
        return [gpu for gpu in visible.split(",") if gpu.strip() and gpu.strip() != "-1"]
    driver = _ROOT / "proc/driver/nvidia/gpus"
    gpus = list(driver.iterdir()) if driver.is_dir() else list((_ROOT / "dev").glob("nvidia[0-9]*"))
    return [str(i) for i in range(len(gpus))]


class HeapTrimmer:
    """Returns freed heap memory to the operating system (malloc_trim).

    Varying batch lengths fragment the glibc heap, so resident memory would otherwise grow for hours.
    """

    def __init__(self, growth: int = 1 << 30) -> None:
        self.growth = growth  # bytes; trimming more often costs as much as the page faults that follow it
        self.baseline: int | None = None  # resident bytes after the first batch since the last trim

    def maybe_trim(self) -> None:
        """Trim once the process has grown by `growth`. Call it after each batch, when most memory is free."""
        malloc_trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
        if malloc_trim is None:  # not glibc
            return
        resident = _resident_bytes()
        if self.baseline is None:
            self.baseline = resident
        elif resident - self.baseline > self.growth:
            malloc_trim(0)
            self.baseline = None


def _resident_bytes() -> int:
    return int(Path("/proc/self/statm").read_text(encoding="utf-8").split()[1]) * os.sysconf("SC_PAGE_SIZE")
