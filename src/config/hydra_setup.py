"""Hydra's set-up beside conf/: the schema, resolvers of default values, and a check before Hydra writes. No torch."""

from __future__ import annotations

import json
import re
import shlex
from typing import Any

from hydra.core.config_store import ConfigStore
from hydra.core.override_parser.types import Quote, QuotedString
from hydra.experimental.callback import Callback
from omegaconf import DictConfig, ListConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from src.config.best_values import BestValues, read_best_values
from src.config.fields import shortened
from src.config.schema import Point
from src.config.secrets import check_secret
from src.config.validation import build_point, check_folder
from src.errors import ConfigError, report_errors
from src.methods import METHODS

_HYDRA_KEYS = ("launcher", "sweeper", "job", "run", "sweep")  # of hydra.*, those whose values users set


def register() -> None:
    """Register the schema with Hydra, and `${best:...}` and `${score_of:...}` with OmegaConf, before composition."""
    ConfigStore.instance().store(name="schema", node=Point)
    OmegaConf.register_new_resolver("best", _best_value, replace=True)
    OmegaConf.register_new_resolver("score_of", _default_score, replace=True)


class CheckBeforeWriting(Callback):
    """Hydra's callback that refuses a wrong config before Hydra makes a folder or writes the config into it."""

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the config of a single run."""
        with report_errors():
            _check_hydra(config)
            point = config.copy()
            with open_dict(point):
                del point["hydra"]
            build_point(point)
            check_folder("hydra.run.dir", config.hydra.run.dir)

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check what is Hydra's own; the sweeper checks the points."""
        with report_errors():
            _check_hydra(config)


def _check_hydra(config: DictConfig) -> None:
    for plugin in ("launcher", "sweeper"):
        value = OmegaConf.select(config.hydra, plugin)
        if not isinstance(value, DictConfig) or "_target_" not in value:
            shown = "null" if value is None else value
            raise ConfigError(f"hydra.{plugin}={shown}: choose one by hydra/{plugin}=NAME, and then set its keys")
    for key in _HYDRA_KEYS:
        _check_node(config.hydra, key, f"hydra.{key}")


def _check_node(parent: DictConfig | ListConfig, name: Any, place: str) -> None:
    try:
        value = parent[name]
    except OmegaConfBaseException:
        return  # refers to what Hydra sets later, such as the number of a job
    if not OmegaConf.is_config(value):
        check_secret(place, {} if value is None else value)
        return
    for inner in range(len(value)) if OmegaConf.is_list(value) else list(value):
        _check_node(value, inner, f"{place}.{inner}")


def _default_score(method: str) -> str:
    """Return the value of `${score_of:${method.name}}`: the method's score in the table of methods."""
    if method not in METHODS:
        raise ConfigError(f"method.name={shortened(str(method))}: must be one of {', '.join(METHODS)}")
    return METHODS[method].score


def _best_value(key: str, *, _root_: DictConfig) -> float:
    """Return the value of `${best:beta}`: the method's best beta in this setup, or in `best_from=FILE`, a best.yaml."""
    method, setup, init, file = _root_.method.name, _root_.setup.name, _root_.init.name, _root_.best_from
    if file is not None:
        best = read_best_values(file, setup, method)
        _check_settings(best, _root_, f"best_from={file}: its best {method}")
        return getattr(best, key)
    table = _root_.setup.best if init == "sft" else {}  # published values are tuned from SFT models
    if method not in table or table[method].get(key) is None:
        raise ConfigError(f"setup={setup} init={init} has no best {key} for method={method}: set {key}=VALUE")
    return float(table[method][key])


def _check_settings(best: BestValues, config: DictConfig, what: str) -> None:
    """Raise ConfigError for the first setting of the config that is not the one the best values were tuned with."""
    for key, value in (best.settings | best.words).items():
        current = OmegaConf.select(config, key)
        if OmegaConf.is_config(current):
            current = OmegaConf.to_container(current)
        if (str(current) if key in best.words else current) != value:
            setting = override_text(key.removesuffix(".name") if key == "init.name" else key, value)
            raise ConfigError(f"{what} was tuned with {setting}; add {setting}, or set beta and lr explicitly")


def override_text(key: str, value: Any) -> str:
    """Return the override that sets a key to a value, quoted for Hydra and for a shell."""
    return shlex.quote(f"{key}={value_text(value)}")


def value_text(value: Any) -> str:
    """Return a value as an override has it, quoted for Hydra."""
    if isinstance(value, str) and not re.fullmatch(r"[\w./:@%+-]+", value, re.ASCII):
        return QuotedString(value, Quote.double).with_quotes()
    return value if isinstance(value, str) else json.dumps(value)
