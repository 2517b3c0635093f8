"""Hydra's set-up beside conf/: the schema, the resolver `${best:...}`, keywords of the command line. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf

from src.config.renamed_keys import new_name
from src.config.schema import Point
from src.errors import ConfigError, one_line

# Hydra composes whatever does not sweep before it asks the sweeper, and `beta=grid` would not compose as a number.
GRID_KEYWORDS = {
    f"{key}={word}": f"{key}=choice({word})" for key, word in (("beta", "grid"), ("lr", "grid"), ("method", "all"))
}


def register() -> None:
    """Register the schema with Hydra and `${best:...}` with OmegaConf; call it once before composition."""
    ConfigStore.instance().store(name="schema", node=Point)
    OmegaConf.register_new_resolver("best", _best_value, replace=True)


def _best_value(key: str, *, _root_: DictConfig) -> float:
    """Return the value of `${best:beta}`: the method's best beta in this setup, or in `best_from=FILE`, a best.yaml."""
    method, setup = _root_.method.name, _root_.setup.name
    if _root_.best_from is None:
        where = f"setup={setup} init={_root_.init.name}"
        table = _root_.setup.best if _root_.init.name == "sft" else {}  # published values are tuned from SFT models
    else:
        where = f"best_from={_root_.best_from}"
        try:
            table = yaml.safe_load(Path(_root_.best_from).read_text(encoding="utf-8"))[setup]
        except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ConfigError(f"{where}: cannot read the best values of setup {setup} ({error!r})") from None
    if method not in table or table[method].get(key) is None:
        raise ConfigError(f"{where} has no best {key} for method={method}: set {key}=VALUE")
    entry = table[method]
    init = f"init={entry['init']} " if entry.get("init") else ""
    for setting in (init + (entry.get("variant") or "")).split():
        name, _, value = setting.partition("=")
        current_key = "init.name" if name == "init" else new_name(name) or name
        if str(OmegaConf.select(_root_, current_key)) != value:
            raise ConfigError(
                f"{where}: its best {method} was tuned with {setting}; add {setting}, or set beta and lr explicitly"
            )
    return float(entry[key])


def encode_keywords(arguments: list[str]) -> list[str]:
    """Return the command line with `beta=grid`, `lr=grid` and `method=all` written as sweeps, which Hydra expects."""
    return [GRID_KEYWORDS.get(argument, argument) for argument in arguments]


def decode_keywords(arguments: list[str]) -> list[str]:
    """Undo `encode_keywords`."""
    keywords = {sweep: keyword for keyword, sweep in GRID_KEYWORDS.items()}
    return [keywords.get(argument, argument) for argument in arguments]


def parse_overrides(arguments: list[str], config_loader: Any = None) -> list[Any]:
    """Parse overrides by Hydra's own grammar. Raises ConfigError."""
    try:
        return OverridesParser.create(config_loader=config_loader).parse_overrides(overrides=arguments)
    except HydraException as error:
        raise ConfigError(one_line(error)) from error
