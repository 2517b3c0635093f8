"""Which differences a sweep can show, before it runs: `python -m sweeps.power [DIR] [GROUP=NAME ...] [key=value ...]`.

Overrides are those of the sweep, as `python -m src.train -m` takes them; with a sweep's folder they replace its own.
Prints the minimal detectable difference of two methods (80 % power, Holm over all pairs of methods), and what more
prompts or seeds would show at what cost. Nothing is run.
"""

from __future__ import annotations

import math
import os
import shlex
import sys
from collections.abc import Sequence
from pathlib import Path

from src.config.hydra_setup import override_text
from src.errors import ConfigError, report_errors
from src.store.sweep_folder import SweepFolder
from sweeps.arguments import ArgumentParser
from sweeps.recorded_command import arguments_of, key_of, without


def sweep_arguments(folder: SweepFolder, overrides: Sequence[str]) -> list[str]:
    """Return the arguments of the sweep's own command, with these overrides in the place of its own."""
    recorded = arguments_of(folder.read()["command"])
    if recorded is None:
        raise ConfigError(f"{folder.path}: its command is none of src.train; give overrides instead of the folder")
    replaced = set(map(key_of, overrides))
    own = without(recorded, {*replaced, "output_dir", "dry_run"})
    output_dir = shlex.split(override_text("output_dir", str(folder.store.output_dir)))
    return [*own, *([] if "output_dir" in replaced else output_dir)]


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m sweeps.power", description=__doc__)
    parser.add_argument("what", nargs="+", metavar="DIR or OVERRIDE", help="such as outputs/sweeps/demo, +sweep=demo")
    parser.add_argument("--sd", type=float, help="standard deviation of the difference of two methods on one prompt")
    options = parser.parse_intermixed_args(arguments)
    with report_errors():
        if options.sd is not None and not 0 < options.sd < math.inf:
            raise ConfigError(f"--sd {options.sd:g}: must be a positive number")
        overrides = [word for word in options.what if "=" in word or word.startswith("~")]
        folders = [Path(word) for word in options.what if word not in overrides]
        if len(folders) > 1:
            raise ConfigError(f"{folders[1]}: a second folder; give one sweep at a time")
        own = ["-m"]
        if folders:
            folder = SweepFolder.open(folders[0])
            own = sweep_arguments(folder, overrides)
            overrides += shlex.split(override_text("hydra.sweeper.folder", str(folder.path.absolute())))
        if options.sd is not None:
            overrides.append(f"hydra.sweeper.standard_deviation={options.sd!r}")
        sys.stdout.flush()
        command = [*own, "hydra/sweeper=power", *overrides]
        os.execv(sys.executable, [sys.executable, "-m", "src.train", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
