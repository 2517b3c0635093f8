"""Let a further judge judge the samples of a sweep: `python -m sweeps.rejudge DIR judge=NAME [judge.KEY=VALUE ...]`.

Nothing is trained, and the samples of the points stay. The results are those of a sweep beside it, DIR_NAME: all that
DIR has, and the verdicts of the other judge as `judges.NAME`, by which nothing is selected.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Sequence
from pathlib import Path

from src.errors import ConfigError, report_errors
from src.store.store import StageName
from src.store.sweep_folder import SweepFolder
from sweeps.arguments import ArgumentParser
from sweeps.recorded_command import arguments_of, key_of, without

REPLACED = ("output_dir", "sweep.name", "sweep.judge_only", "dry_run")  # keys of the recorded command


def rejudge_command(folder: SweepFolder, overrides: Sequence[str], name: str | None = None) -> list[str]:
    """Return the arguments of `src.train` that judge the sweep's samples again.

    name: of the judge in the results, by default that of its config. Raises ConfigError when samples are gone, or no
    judge is named.
    """
    record = folder.read()
    recorded = arguments_of(record["command"])
    if recorded is None:
        raise ConfigError(
            f"{folder.path}: was not made by src.train, but by {record['command']}; judge the study's sweep"
        )
    lacking = [p for p in record["points"] if not folder.store.is_done(StageName("generate", p["stages"]["generate"]))]
    if lacking:
        raise ConfigError(
            f"{folder.path}: {len(lacking)} of {len(record['points'])} points have no samples to judge; this command "
            f"makes them: {record['command']}"
        )
    options = [override.partition("=")[2] for override in overrides if override.startswith("judge=")]
    if len(options) != 1 or not options[0] or "," in options[0]:
        raise ConfigError("which judge? Add judge=NAME, of conf/judge; several are given one after the other")
    name = name or options[0]
    own = without(recorded, REPLACED)
    if f"judge@judges.{name}" in map(key_of, own):
        raise ConfigError(f"{folder.path}: has a judge {name} already; give this one another name, --as NAME")
    new = [_of_judge(override, name) for override in overrides]
    output_dir, sweep = str(folder.store.output_dir), f"{folder.name}_{name}"
    return [*own, f"output_dir={output_dir}", f"sweep.name={sweep}", "sweep.judge_only=true", *new]


def _of_judge(override: str, name: str) -> str:
    """Return an override of `judge` as one of judges.NAME, any other unchanged."""
    if override.startswith("judge="):
        return f"+judge@judges.{name}={override.partition('=')[2]}"
    return f"judges.{name}.{override.removeprefix('judge.')}" if override.startswith("judge.") else override


def main(arguments: Sequence[str]) -> None:
    parser = ArgumentParser(prog="python -m sweeps.rejudge", description=__doc__)
    parser.add_argument("folder", type=Path, metavar="DIR", help="of a sweep, such as outputs/sweeps/demo")
    parser.add_argument("overrides", nargs="+", help="judge=NAME, judge.KEY=VALUE, and others of src.train")
    parser.add_argument("--as", dest="name", help="the judge's name in the results; by default that of its config")
    options = parser.parse_intermixed_args(arguments)
    with report_errors():
        command = rejudge_command(SweepFolder.open(options.folder), options.overrides, options.name)
        sys.stdout.flush()
        os.execv(sys.executable, [sys.executable, "-m", "src.train", *command])


if __name__ == "__main__":
    main(sys.argv[1:])
