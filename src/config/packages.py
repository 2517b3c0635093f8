"""Optional packages, found without importing them."""

from __future__ import annotations

import contextlib
import importlib.util
from pathlib import Path

from src.errors import ConfigError

# package -> command that installs it
INSTALL = {
    "deepspeed": "pip install --no-build-isolation '.[zero]'",
    "flash_attn": "pip install --no-build-isolation '.[flash]'",
    "openai": "pip install '.[judges]'",
    "alpaca_eval": "pip install '.[alpaca]'",
    "wandb_workspaces": "pip install '.[dashboards]'",
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
        raise ConfigError(
            f"{setting} needs the package {package}: {INSTALL[package]}, in the environment that jobs use"
        )
    return folder
