"""The command that shows more: that of the sweep, with some of its overrides replaced."""

from __future__ import annotations

import shlex
from collections.abc import Mapping

from sweeps.recorded_command import arguments_of, without


def next_command(command: str, name: str, overrides: Mapping[str, str]) -> str:
    """Return the sweep's command with these overrides instead of its own, as a sweep of another name beside it.

    Finished stages of the store are reused. Empty for a sweep that another program than src.train made. command: as
    sweep.json has it. name: of that sweep.
    """
    arguments = arguments_of(command)
    if arguments is None:
        return ""
    replaced = {**overrides, "sweep.name": "_".join([name, *filter(str.isidentifier, _words(overrides))])}
    new = [f"{key}={value}" for key, value in replaced.items()]
    return shlex.join(["python", "-m", "src.train", *without(arguments, replaced), *new])


def _words(overrides: Mapping[str, str]) -> list[str]:
    """Return what tells this sweep from others by its name: the method, and the keys that are changed."""
    method = [overrides["method"]] if "method" in overrides else []
    return [*method, *(key.rpartition(".")[2] for key in overrides if key not in ("method", "setup", "init"))]
