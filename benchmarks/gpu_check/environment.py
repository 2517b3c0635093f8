"""Versions, the card, and what it reaches: the rate of a bf16 product and of a copy."""

from __future__ import annotations

import importlib.metadata
import platform
import time
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting
from src.planning.gpus import Gpu, find_device

PACKAGES = ("transformers", "accelerate", "triton", "liger-kernel", "peft", "deepspeed", "trl", "flash-attn")
OLDEST = {"torch": (2, 11), "transformers": (5, 17)}
# Fractions of the rates in conf/gpus.yaml: 600 TFLOP/s and 2.5 TB/s of an H100.
PRODUCT_FRACTION, COPY_FRACTION = 0.75, 0.9
WHY_CEILINGS = "less is a card that is shared, throttled or not what its name says: no time measured on it means much"


def describe() -> dict[str, Any]:
    """Return the card's name (None without one) and the versions that results depend on. Starts CUDA."""
    card = torch.cuda.get_device_name() if torch.cuda.is_available() else None
    memory = round(torch.cuda.get_device_properties(0).total_memory / 2**30, 1) if card else None
    versions = {name: version(name) for name in PACKAGES}
    return {
        "card": card,
        "cards": torch.cuda.device_count(),
        "GiB": memory,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "CUDA": torch.version.cuda,
        **versions,
    }


def version(package: str) -> str | None:
    """Return the installed version, or None."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def run(setting: Setting) -> list[Row]:
    rows = [version_row(setting, package, oldest) for package, oldest in OLDEST.items()]
    if setting.on_card:
        free, total = torch.cuda.mem_get_info()
        shared = Limit(2.0, "more is another process on this card: neither memory nor time would be this run's")
        rows.append(setting.row("memory in use before the check", (total - free) / 2**30, "GiB", shared))
    rows += [product(setting), copy(setting)]
    return rows


def version_row(setting: Setting, package: str, oldest: tuple[int, int]) -> Row:
    """Return 1 when the package is new enough, else 0."""
    installed = version(package) or "0.0"
    is_supported = tuple(int(number) for number in installed.split(".")[:2]) >= oldest
    name = f"{package} is {oldest[0]}.{oldest[1]} or newer"
    return setting.row(name, is_supported, "", Limit(1, "older ones lack what the code calls", "least"), installed)


def seconds(function: Callable[[], Any], times: int) -> float:
    """Return the fastest of several runs, in seconds, after one to warm up."""
    function()
    durations = []
    for _ in range(times):
        synchronize()
        started = time.perf_counter()
        function()
        synchronize()
        durations.append(time.perf_counter() - started)
    return min(durations)


def synchronize() -> None:
    """Wait for the card's kernels, where there is one."""
    if torch.cuda.is_initialized():
        torch.cuda.synchronize()


def product(setting: Setting) -> Row:
    """Measure a square product: bf16 of 8192 on a card, float32 of 512 on a CPU."""
    size, dtype = (8192, torch.bfloat16) if setting.on_card else (512, torch.float32)
    a = torch.randn(size, size, device=setting.device, dtype=dtype)
    rate = 2 * size**3 / seconds(lambda: a @ a, 20) / 1e12
    limit = Limit(PRODUCT_FRACTION * gpu.bf16_peak / 1e12, WHY_CEILINGS, "least") if (gpu := gpu_of(setting)) else None
    return setting.row(f"product of {size} x {size}, {str(dtype)[6:]}", rate, "TFLOP/s", limit)


def copy(setting: Setting) -> Row:
    """Measure a copy within the device's memory, reads and writes counted."""
    size = 2**31 if setting.on_card else 2**24
    source = torch.empty(size, device=setting.device, dtype=torch.uint8)
    target = torch.empty_like(source)
    rate = 2 * size / seconds(lambda: target.copy_(source), 10) / 1e12
    limit = Limit(COPY_FRACTION * gpu.bandwidth / 1e12, WHY_CEILINGS, "least") if (gpu := gpu_of(setting)) else None
    return setting.row(f"copy of {size / 2**30:.3g} GiB", rate, "TB/s", limit)


def gpu_of(setting: Setting) -> Gpu | None:
    """Return what conf/gpus.yaml has about the card; None without one."""
    return find_device(setting.card or "")
