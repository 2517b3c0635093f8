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
    "liger_kernel": "pip install '.[fused]'",
    "math_verify": "pip install '.[math]'",
    "alpaca_eval": "pip install '.[alpaca]'",
    "lm_eval": "pip install '.[capability]'",
    "wandb_workspaces": "pip install '.[dashboards]'",
}


def package_folder(package: str) -> Path | None:
    """Return the folder of an installed package; None when it is not installed, or has no folder."""
    top, *inner = package.split(".")
    with contextlib.suppress(ValueError):  # a module without a spec, such as __main__
        spec = importlib.util.find_spec(top)  # of an inner package it would import the outer one
        if spec is not None and spec.submodule_search_locations:
            folder = Path(next(iter(spec.submodule_search_locations))).joinpath(*inner)
            return folder if folder.is_dir() else None
    return None


def require_package(package: str, setting: str) -> Path:
    """Return the folder of an installed package. Raises ConfigError, naming the setting that needs it, without it."""
    folder = package_folder(package)
    if folder is None:
        raise ConfigError(
            f"{setting} needs the package {package}: {INSTALL[package]}, in the environment that jobs use"
        )
    return folder
