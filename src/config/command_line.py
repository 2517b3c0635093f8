"""Checks of a command line before Hydra composes, prints or writes anything. No torch."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import NoReturn

from hydra._internal.utils import get_args_parser

from src.config.fields import shortened
from src.config.overrides import check_without_sweep, encode_keywords, parse_overrides
from src.config.renamed_keys import check_renamed
from src.config.secrets import check_arguments
from src.errors import ConfigError


def check_command_line(arguments: Sequence[str]) -> list[str]:
    """Return the overrides among the arguments. Raises ConfigError for the first that cannot be right.

    Secrets come first, because every other message may repeat an argument.
    """
    for number, argument in enumerate(arguments, 1):
        if any("\ud800" <= character <= "\udfff" for character in argument):
            raise ConfigError(f"argument {number} is not text in UTF-8")
    check_arguments(arguments)
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ConfigError("the current folder was deleted: cd to the project's folder") from None
    return _overrides(arguments)


def _overrides(arguments: Sequence[str]) -> list[str]:
    """Return the arguments that are overrides, after Hydra's flags were checked."""
    parser = get_args_parser()
    parser.error = _refuse  # argparse prints its usage, which fills half a screen
    flags = parser.parse_args(list(arguments))
    modes = [flags.run, flags.multirun, flags.cfg, flags.info, flags.shell_completion]
    if sum(mode is not None and mode is not False for mode in modes) > 1:
        raise ConfigError("only one of --run, --multirun, --cfg, --info and --shell-completion can be given")
    if flags.resolve and not (flags.cfg or flags.help):
        raise ConfigError("--resolve: only together with --cfg or --help")
    if flags.experimental_rerun:
        raise ConfigError("--experimental-rerun: not supported; run the same command again")
    if flags.shell_completion:
        return []  # words that are not finished
    overrides: list[str] = flags.overrides
    check_renamed(overrides)
    if flags.multirun or "hydra.mode=MULTIRUN" in overrides or flags.cfg or flags.info:
        parse_overrides(encode_keywords(overrides))
    else:
        check_without_sweep(overrides)
    return overrides


def _refuse(message: str) -> NoReturn:
    if message.startswith("unrecognized") and "=" in message:  # argparse takes overrides in one run of words
        raise ConfigError(f"{shortened(message)}; write flags such as -m first, then all overrides")
    raise ConfigError(f"{shortened(message)}; --hydra-help lists the options")
