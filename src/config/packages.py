"""Optional packages, found without importing them."""

from __future__ import annotations

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


def require_package(package: str, setting: str) -> Path:
    """Return the folder of an installed package. Raises ConfigError, naming the setting that needs it, without it."""
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        extra = EXTRAS[package]
        command = "pip install --no-build-isolation" if extra in ("zero", "flash") else "pip install"
        raise ConfigError(
            f"{setting} needs the package {package}: {command} '.[{extra}]', in the environment that jobs use"
        )
    return Path(spec.submodule_search_locations[0])
