"""The words of a command line: Hydra's override grammar, and `beta=grid`, `lr=grid`, `method=all` beside it."""

from __future__ import annotations

from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from src.config import ConfigError, one_line

# Hydra composes whatever does not sweep before it asks the sweeper, and these would not compose.
GRID_WORDS = {
    f"{key}={word}": f"{key}=choice({word})" for key, word in (("beta", "grid"), ("lr", "grid"), ("method", "all"))
}


def as_sweeps(arguments: list[str]) -> list[str]:
    """The command line with `beta=grid`, `lr=grid` and `method=all` written as the sweeps they are."""
    return [GRID_WORDS.get(a, a) for a in arguments]


def as_typed(arguments: list[str]) -> list[str]:
    """What as_sweeps was given."""
    words = {sweep: word for word, sweep in GRID_WORDS.items()}
    return [words.get(a, a) for a in arguments]


def parse_overrides(arguments: list[str], config_loader: Any = None) -> list[Any]:
    """Hydra's own override grammar. Raises ConfigError."""
    try:
        return OverridesParser.create(config_loader=config_loader).parse_overrides(overrides=arguments)
    except HydraException as error:
        raise ConfigError(one_line(error)) from error
