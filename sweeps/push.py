"""Publish the best models of a sweep and its study on the Hugging Face Hub: `python -m sweeps.push DIR --to USER/NAME`.

The folder has a model with its card for each method, and the study as a data set. Nothing leaves this machine until
--upload is given, which makes the calls that are printed without it; repositories are private unless --public is.
"""

from __future__ import annotations

import re
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from src.config.validation import check_folder
from src.errors import ConfigError, StageError, SweepFailed, report_errors, warn
from src.progress import RunProgress
from src.store.sweep_folder import SweepFolder
from sweeps.analysis.results import collect
from sweeps.arguments import ArgumentParser
from sweeps.share.chosen import PublishedSweep, choose
from sweeps.share.publish import check_target, write_folders
from sweeps.share.upload import Repository, check_repository, creating, upload, uploading
from sweeps.study.comparison import check_tables

_LICENSE = re.compile(r"[a-z0-9][a-z0-9.-]*")


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.push", description=__doc__)
    parser.add_argument("dir", type=Path, help="a sweep's folder, such as outputs/sweeps/demo")
    parser.add_argument("--to", required=True, metavar="USER/NAME", help="the data set; models are USER/NAME-METHOD")
    parser.add_argument("--folder", type=Path, help="folder to write; default: hub, in the sweep's")
    parser.add_argument("--license", help="of models and data, as the hub names it: apache-2.0; needed for --upload")
    parser.add_argument("--base-model", metavar="USER/NAME", help="the base model's name on the hub, if it was local")
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--methods", nargs="+", metavar="METHOD", help="only the models of these; default: of all")
    which.add_argument("--no-models", action="store_true", help="the study alone")
    parser.add_argument("--public", action="store_true", help="repositories that everybody may read")
    calls = parser.add_mutually_exclusive_group()
    calls.add_argument("--upload", action="store_true", help="upload the folder")
    calls.add_argument("--dry-run", action="store_true", help="only write the folder and print the calls (default)")
    arguments = parser.parse_args()
    with report_errors():
        check_repository("--to", arguments.to)
        if arguments.base_model is not None:
            check_repository("--base-model", arguments.base_model)
        _check_license(arguments.license, arguments.upload)
        folder = SweepFolder.open(arguments.dir)
        target = arguments.folder or folder.hub
        check_folder("--folder", str(target))
        check_target(target)
        results = collect([folder])
        if results.damaged:
            raise SweepFailed(f"{next(iter(results.damaged.values()))}; run the sweep again to remake it")
        study = choose(folder, results, [] if arguments.no_models else arguments.methods)
        if folder.points_csv.exists():  # where it is missing, the study.zip is refused
            check_tables(folder)
        if study.num_done < len(results.points):
            warn(f"{folder.name}: {study.num_done} of {len(results.points)} points have results; the cards say so")
        try:
            with RunProgress() as report:
                repositories = write_folders(
                    target, study, arguments.to, arguments.license, arguments.base_model, report
                )
        except OSError as error:
            raise StageError(
                f"{error.filename2 or error.filename or target}: {error.strerror}; --folder=FOLDER names another place"
            ) from error
        message = f"Sweep {folder.name}"
        print_repositories(repositories, study, target)
        if arguments.upload:
            upload(repositories, arguments.public, message, lambda line: print(line, flush=True))
        else:
            print_calls(repositories, arguments.public, message, arguments.license)
    return 0


def _check_license(license: str | None, is_needed: bool) -> None:
    if license is None:
        if is_needed:
            raise ConfigError(
                "--upload: under which license? Add --license=LICENSE, as the hub names it: apache-2.0, cc-by-4.0, "
                "other (the licenses of the base model and of the data may decide it)"
            )
    elif not _LICENSE.fullmatch(license):
        raise ConfigError(f"--license={license}: no name of a license on the hub, as apache-2.0, cc-by-4.0 or other")


def print_repositories(repositories: list[Repository], study: PublishedSweep, target: Path) -> None:
    """Print a row for every folder: its repository, files and size."""
    console = Console(highlight=False, markup=False, emoji=False)
    if not console.is_terminal:
        console.width = 200  # the width at which a log is read is unknown
    table = Table(title=f"{study.folder.name}: {target}")
    for column in ("folder", "repository", "kind", "content"):
        table.add_column(column, no_wrap=True)
    for column in ("files", "size"):
        table.add_column(column, justify="right", no_wrap=True)
    for one in repositories:
        size = f"{one.size / 2**20:.1f} MiB"
        table.add_row(one.folder.name, one.name, one.kind, one.summary, str(len(one.files)), size)
    console.print(table)


def print_calls(repositories: list[Repository], public: bool, message: str, license: str | None) -> None:
    """Print the calls that --upload would make."""
    print(f"nothing was uploaded; with --upload these calls are made ({'public' if public else 'private'}):")
    for repository in repositories:
        print(creating(repository, public))
    for repository in repositories:
        print(uploading(repository, message))
    if license is None:
        print("the cards have no license yet: --license=LICENSE, which --upload needs")


if __name__ == "__main__":
    sys.exit(main())
