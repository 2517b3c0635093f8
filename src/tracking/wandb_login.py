"""How W&B's client is configured on this machine, read without importing it."""

from __future__ import annotations

import configparser
import netrc
import os
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import urlparse

from src.config.schema import WandbTracking

MAX_BYTES = 2**20  # of a file with logins or settings


@dataclass(frozen=True)
class WandbTarget:
    """Where W&B runs go."""

    project: str
    entity: str | None  # None: the default of the account
    mode: str  # online | offline

    def __str__(self) -> str:
        return self.project if self.entity is None else f"{self.entity}/{self.project}"


def resolve_target(tracking: WandbTracking) -> WandbTarget | None:
    """Return where runs go on this machine; None when W&B is switched off in the config or by WANDB_MODE=disabled."""
    mode = tracking.mode
    if mode == "auto":
        mode = _setting("mode") or ("online" if logged_in() else "offline")
        mode = {"run": "online", "dryrun": "offline"}.get(mode, mode)  # the client's older names
    if not tracking.enabled or mode not in ("online", "offline"):
        return None
    return WandbTarget(tracking.project, tracking.entity, mode)


def logged_in() -> bool:
    """Return whether there is an API key for the server, in WANDB_API_KEY or where `wandb login` writes it."""
    if os.environ.get("WANDB_API_KEY"):
        return True
    host = urlparse(base_url() or "https://api.wandb.ai").netloc
    try:
        file = Path(os.environ.get("NETRC", "~/.netrc")).expanduser()
        return _is_small_file(file) and netrc.netrc(file).authenticators(host) is not None
    except (OSError, RuntimeError, ValueError, netrc.NetrcParseError):  # no home; not UTF-8
        return False


def _is_small_file(path: Path) -> bool:
    """Return whether reading the file can neither wait, as for a pipe, nor take long."""
    return path.is_file() and path.stat().st_size <= MAX_BYTES


def base_url() -> str | None:
    """Return the address of the W&B server; None for the public one."""
    return _setting("base_url")


def _setting(name: str) -> str | None:
    """Return a setting of W&B's client: the variable, or what `wandb login --host` or `wandb offline` stored."""
    if value := os.environ.get(f"WANDB_{name.upper()}"):
        return value
    settings = configparser.ConfigParser(interpolation=None)
    for folder in (os.environ.get("WANDB_CONFIG_DIR", "~/.config/wandb"), "wandb"):
        with suppress(configparser.Error, OSError, RuntimeError, UnicodeDecodeError):
            file = Path(folder).expanduser() / "settings"
            if _is_small_file(file):
                settings.read(file, encoding="utf-8")
    return settings.get("default", name, fallback=None)
