"""Optional packages, found without importing them."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from src.errors import ConfigError

# package -> extra of pyproject.toml that installs it
EXTRAS = {
    "deepspeed": "zero",
    "flash_attn": "flash",
    "openai": "judges",
    "alpaca_eval": "alpaca",
    "wandb_workspaces": "dashboards",
}


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package; None when it is not installed, or has no folder."""
    with contextlib.suppress(ModuleNotFoundError):  # the parent package is missing
        spec = importlib.util.find_spec(package)
        if spec is not None and spec.submodule_search_locations:
            return Path(next(iter(spec.submodule_search_locations)))
    return None


def require_package(package: str, setting: str) -> Path:
    """Return the folder of an installed package. Raises ConfigError, naming the setting that needs it, without it."""
    folder = package_folder(package)
    if folder is None:
        extra = EXTRAS[package]
        command = "pip install --no-build-isolation" if extra in ("zero", "flash") else "pip install"
        raise ConfigError(
            f"{setting} needs the package {package}: {command} '.[{extra}]', in the environment that jobs use"
        )
    return folder
