"""What Hydra composes a run from besides the files of conf/: the schema, and the best values of a method. No torch."""

from __future__ import annotations

from pathlib import Path

import yaml
from hydra.core.config_store import ConfigStore
from omegaconf import DictConfig, OmegaConf

from src.config import ConfigError, Point


def register() -> None:
    """Make the schema known to Hydra and `${best:...}` to OmegaConf; called once before composition."""
    ConfigStore.instance().store(name="schema", node=Point)
    OmegaConf.register_new_resolver("best", _best_value, replace=True)


def _best_value(key: str, *, _root_: DictConfig) -> float:
    """`${best:beta}`: the setup's best value for the chosen method, or that of `best_from=FILE` (a best.yaml)."""
    method, setup = _root_.method.name, _root_.setup.name
    if _root_.best_from is None:
        where = f"setup={setup} init={_root_.init.name}"
        table = _root_.setup.best if _root_.init.name == "sft" else {}  # published values are those of two stages
    else:
        where = f"best_from={_root_.best_from}"
        try:
            table = yaml.safe_load(Path(_root_.best_from).read_text())[setup]
        except (OSError, KeyError, TypeError, yaml.YAMLError) as error:
            raise ConfigError(f"{where}: no best values of setup {setup} can be read there ({error!r})") from None
    if method not in table or table[method].get(key) is None:
        raise ConfigError(f"{where} names no best {key} for method={method}: give {key}=VALUE")
    entry = table[method]
    init = entry.get("init")
    if init is not None and init != _root_.init.name:
        raise ConfigError(
            f"{where}: its best {method} is of init={init}; add init={init}, or give beta and lr yourself"
        )
    for setting in (entry.get("variant") or "").split():
        name, _, value = setting.partition("=")
        if str(OmegaConf.select(_root_, name)) != value:
            raise ConfigError(f"{where}: its best {method} has {setting}; add that, or give beta and lr yourself")
    return float(entry[key])
