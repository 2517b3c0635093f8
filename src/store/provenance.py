"""With what a stage was computed: versions of packages, the GPU and its driver. Nothing is imported for it."""

from __future__ import annotations

import contextlib
import platform
import subprocess
import sys
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from src.errors import ConfigError
from src.store.files import read_json
from src.store.integrity import DONE

PACKAGES = ("torch", "transformers", "accelerate", "datasets")
# Kernels that a model uses where they are installed and fit: name -> the module that using it loads.
OPTIONAL_KERNELS = {"flash-attn": "flash_attn", "liger-kernel": "liger_kernel"}
COMPARED = ("torch", "transformers")  # packages whose major versions may change results
DRIVER_FILE = Path("/sys/module/nvidia/version")


def provenance(packages: Iterable[str] = ()) -> dict[str, Any]:
    """Return the `versions` of Python and of the packages that a stage used, and its `gpu`, None without one.

    packages: what it used besides torch and the like; one that is not in this environment has no version.
    """
    used = [*PACKAGES, *packages, *(name for name, module in OPTIONAL_KERNELS.items() if module in sys.modules)]
    installed = {name: number for name in used if (number := installed_version(name)) is not None}
    return {"versions": {"python": platform.python_version()} | installed, "gpu": _gpu()}


def installed_version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _gpu() -> dict[str, str | None] | None:
    """Return name, driver and CUDA version of the GPU that torch uses in this process."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_initialized():
        return None
    return {"name": torch.cuda.get_device_name(), "driver": _driver(), "cuda": torch.version.cuda}


def _driver() -> str | None:
    with contextlib.suppress(OSError):
        return DRIVER_FILE.read_text(encoding="utf-8").strip()
    query = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]  # containers may lack the file
    with contextlib.suppress(OSError, subprocess.SubprocessError):
        return subprocess.run(query, capture_output=True, text=True, timeout=10, check=True).stdout.split()[0]
    return None


def describe_other_versions(folders: Iterable[Path]) -> str | None:
    """Return one line on stages that were computed with another major version of a package; None without any.

    folders: of finished stages. Of a version 0.x the second number is the major one.
    """
    others: set[str] = set()
    for folder in folders:
        with contextlib.suppress(ConfigError, FileNotFoundError):  # damaged or removed: it will not be reused
            versions = read_json(folder / DONE).get("versions", {})
            for name in COMPARED:
                made, here = versions.get(name), installed_version(name)
                if made and here and _major(made) != _major(here):
                    others.add(f"{name} {made}")
    if not others:
        return None
    here = ", ".join(f"{name} {installed_version(name)}" for name in COMPARED)
    return (
        f"results that were computed with {', '.join(sorted(others))} are reused; this environment has {here} "
        "(another output_dir computes them anew)"
    )


def _major(number: str) -> list[str]:
    parts = number.split(".")
    return parts[:2] if parts[0] == "0" else parts[:1]
