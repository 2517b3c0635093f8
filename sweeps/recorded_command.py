"""The command that made a sweep, as sweep.json has it, and its overrides with others in the place of some."""

from __future__ import annotations

import shlex
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from src.config.hydra_setup import value_text

_GROUP_NAME = ".name"  # ends the key of a setting that names the option of a group: `model.name` is chosen by `model=`


def arguments_of(command: str) -> list[str] | None:
    """Return the arguments of src.train in a recorded command; None for a command of another program.

    They make the points of the sweep: sweep.judge_only, by which sweeps.rejudge lets nothing be trained, is left out.
    """
    words = shlex.split(command)
    return without(words[words.index("src.train") + 1 :], ["sweep.judge_only"]) if "src.train" in words else None


def key_of(override: str) -> str:
    """Return the key, or the group, that an override sets, adds or deletes."""
    return override.partition("=")[0].lstrip("+~")


def without(arguments: Sequence[str], keys: Collection[str]) -> list[str]:
    """Return the arguments but for the overrides of these keys."""
    return [argument for argument in arguments if key_of(argument) not in keys]


def variant_overrides(settings: Mapping[str, Any]) -> dict[str, str]:
    """Return key -> value of the overrides that choose a variant. settings: those it is made of."""
    return {key.removesuffix(_GROUP_NAME): value_text(value) for key, value in settings.items()}
