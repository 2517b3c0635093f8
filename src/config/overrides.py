"""Overrides of a command line, parsed by Hydra's own grammar and checked one by one before Hydra composes. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from difflib import get_close_matches
from typing import Any

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import ChoiceSweep, IntervalSweep, Override, RangeSweep, Sweep

from src.config.fields import shortened
from src.config.schema import CONF_DIR
from src.errors import ConfigError

MAX_VALUES = 10_000  # that one override may expand to
MAX_CHARACTERS = 100_000  # of one override: parsing takes a second for 20,000

# Hydra composes whatever does not sweep before it asks the sweeper, and `beta=grid` would not compose as a number.
GRID_KEYWORDS = {
    f"{key}={word}": f"{key}=choice({word})" for key, word in (("beta", "grid"), ("lr", "grid"), ("method", "all"))
}


def encode_keywords(arguments: Sequence[str]) -> list[str]:
    """Return the command line with `beta=grid`, `lr=grid` and `method=all` written as sweeps, which Hydra expects."""
    return [GRID_KEYWORDS.get(argument, argument) for argument in arguments]


def decode_keywords(arguments: Sequence[str]) -> list[str]:
    """Undo `encode_keywords`."""
    keywords = {sweep: keyword for keyword, sweep in GRID_KEYWORDS.items()}
    return [keywords.get(argument, argument) for argument in arguments]


def parse_overrides(arguments: Sequence[str], config_loader: Any = None) -> list[Override]:
    """Parse overrides, and check what Hydra leaves to its users. Raises ConfigError, which begins with the override."""
    parser = OverridesParser.create(config_loader=config_loader)
    return [_parse(argument, parser) for argument in arguments]


def _parse(argument: str, parser: OverridesParser) -> Override:
    shown = shortened(decode_keywords([argument])[0])
    if len(argument) > MAX_CHARACTERS:
        raise ConfigError(f"{shown}: too long; an override has at most {MAX_CHARACTERS:,} characters")
    key, equals, _ = argument.partition("=")
    if not key.lstrip("+~") or not (equals or argument.startswith("~")):
        raise ConfigError(f"{shown}: must be KEY=VALUE or GROUP=NAME")
    try:
        (override,) = parser.parse_overrides([argument])
        value = override.value()
    except Exception as error:  # the grammar's own errors, and those of numbers and functions in the value
        raise ConfigError(f"{shown}: {_syntax_error(error, key)}") from None
    if "_target_" in argument:
        raise ConfigError(f"{shown}: names code to be run, which only a YAML file may do (--config-dir)")
    group = key.lstrip("+~").partition("@")[0]
    if override.is_sweep_override():
        _check_sweep(shown, value)
        choices = value.list if isinstance(value, ChoiceSweep) else []
        if group in GROUPS and any(name is None or isinstance(name, int | float) for name in choices):
            raise ConfigError(f"{shown}: must be {group}=NAME,NAME; {options_text(group)}")
    elif group in GROUPS and not (override.is_delete() and value is None):
        names = value if isinstance(value, list) else [value]
        only_one = override.is_delete() and isinstance(value, list)
        if only_one or (not isinstance(value, dict) and not all(isinstance(name, str) for name in names)):
            raise ConfigError(f"{shown}: must be {group}=NAME; {options_text(group)}")
    return override


def _syntax_error(error: Exception, key: str) -> str:
    """Return what is wrong with the syntax of an override, and how to write it."""
    text = str(error)
    number = re.search(r"Exceeds the limit \(\d+ digits\)", text)
    if number:
        return "the number has too many digits"
    if isinstance(error, RecursionError):
        return "brackets are nested too deeply"
    if called := re.search(r"while evaluating '.*?': (.*)", text):
        return f"{called[1]}; sweeps are a,b or choice(a,b) or range(START,STOP,STEP)"
    return (
        "not in Hydra's syntax; close every bracket and quote, and put a value with = , spaces or other special "
        f"characters into two kinds of quotes: {key}='\"VALUE\"'"
    )


def _check_sweep(shown: str, sweep: Any) -> None:
    """Raise ConfigError for a sweep without values, without end, or with too many."""
    if isinstance(sweep, IntervalSweep):
        raise ConfigError(f"{shown}: an interval has no list of values; use choice(a,b) or range(START,STOP,STEP)")
    if isinstance(sweep, ChoiceSweep):
        if any(isinstance(value, Sweep) for value in sweep.list):
            raise ConfigError(f"{shown}: a sweep inside a sweep; write one choice(a,b,...)")
        count = float(len(sweep.list))
    elif isinstance(sweep, RangeSweep):
        start, stop, step = sweep.start, sweep.stop, sweep.step
        if start is None or stop is None or not all(map(math.isfinite, (start, stop, step))) or step == 0:
            raise ConfigError(f"{shown}: START, STOP and STEP must be finite numbers, and STEP not 0")
        count = (stop - start) / step
    else:
        return  # a glob has at most as many values as its group has options
    if count <= 0:
        raise ConfigError(f"{shown}: expands to no values")
    if not count <= MAX_VALUES:
        raise ConfigError(f"{shown}: expands to more than {MAX_VALUES:,} values")


def check_without_sweep(arguments: Sequence[str]) -> None:
    """Raise ConfigError for an override that expands to several values, where no sweep was asked for."""
    for argument, override in zip(arguments, parse_overrides(encode_keywords(arguments)), strict=True):
        if override.is_sweep_override():
            raise ConfigError(
                f"{shortened(argument)}: expands to several points: add -m to run a sweep (or quote a value that has "
                "commas or parentheses itself)"
            )


# Config groups, of which an option is chosen by name, as in `model=NAME`.
GROUPS = {file.parent.relative_to(CONF_DIR).as_posix() for file in CONF_DIR.glob("**/*/*.yaml")}


def options_text(group: str) -> str:
    """Return which options a config group has, in words."""
    return f"there are {', '.join(sorted(path.stem for path in (CONF_DIR / group).glob('*.yaml')))}"


def did_you_mean(word: str, known: Sequence[str]) -> str:
    """Return a hint about the known word that is most like this one; empty when none is."""
    close = get_close_matches(word, known, n=1, cutoff=0.6)
    return f"; did you mean {close[0]}?" if close and close[0] != word else ""
