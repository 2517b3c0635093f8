"""Compute the results of a study.zip again, and compare: `python -m sweeps.reproduce study.zip`.

From its samples, verdicts and validation rows every number of points.csv, best.yaml, tables and figures is computed by
this code and compared with the study's. With `--points best` the chosen points are also run again here, and it is
tested whether their new values lie in the intervals of the study.

Exit code 0: all is equal. 1: something differs, and it is said what. 2: no study, or not one that can be read.
"""

from __future__ import annotations

import sys
import tempfile
import time
from pathlib import Path

from src.config.validation import check_folder
from src.errors import report_errors
from src.store.code_snapshot import code_digest
from src.store.sweep_folder import SweepFolder
from sweeps.arguments import ArgumentParser
from sweeps.study.archive import UnpackedStudy, unpack

MAX_LINES = 40  # of one kind that are printed


def main() -> int:
    parser = ArgumentParser(prog="python -m sweeps.reproduce", description=__doc__)
    parser.add_argument("study", type=Path, help="a zip of python -m sweeps.pack")
    parser.add_argument("--points", choices=("best",), help="run these points again here: the best one of each method")
    parser.add_argument("--methods", nargs="+", metavar="METHOD", help="with --points: those of these methods alone")
    parser.add_argument(
        "--output-dir", type=Path, metavar="DIR", help="with --points: for the new results; default: outputs/reproduced"
    )
    arguments = parser.parse_args()
    if arguments.points is None and (arguments.methods or arguments.output_dir):
        parser.error("--methods and --output-dir go with --points best")
    output_dir = arguments.output_dir or Path("outputs/reproduced")
    with report_errors():
        check_folder("--output-dir", str(output_dir))
        with tempfile.TemporaryDirectory(prefix="study-") as folder:
            study = unpack(arguments.study, Path(folder))
            is_equal = reproduce(arguments.study, study)
            if arguments.points is None:
                return 0 if is_equal else 1
            from sweeps.study.rerun import rerun_best

            print()
            is_inside = rerun_best(study, output_dir, arguments.methods, arguments.study)
    return 0 if is_equal and is_inside else 1


def reproduce(path: Path, study: UnpackedStudy) -> bool:
    """Compute everything again, print what was compared and what differs; return whether all is equal."""
    from sweeps.aggregate import aggregate
    from sweeps.study.comparison import compare
    from sweeps.study.recompute import recompute_results

    started, points = time.monotonic(), study.description["points"]
    commit = (study.description["code"]["packed_with"]["commit"] or "an unknown commit")[:10]
    print(f"{path}: {study.folder.name}, {points['done']} of {points['all']} points, packed by code of {commit}")
    _print_lines("not as it was packed", study.changes)
    moved = recompute_results(study.folder.store.root)
    _print_lines(
        "not what its rows give", [f"{m.file}, {m.place}: {m.old} in the study, {m.new} computed again" for m in moved]
    )
    again = SweepFolder(study.folder.output_dir / "again" / study.folder.name)
    again.path.mkdir(parents=True)
    aggregate([study.folder], again.path, quiet=True)
    comparison = compare(study.folder, again)
    _print_lines("different", comparison.lines)
    _print_lines("drawn differently", comparison.figures)
    counts = comparison.files
    print(
        f"compared: points.csv, best.yaml and {counts['tables']} tables with {comparison.numbers:,} numbers, "
        f"{counts['figures']} figures, in {time.monotonic() - started:.0f} s"
    )
    if comparison.rounded:
        print(f"{comparison.rounded:,} numbers differ by rounding alone, less than a billionth of their value")
    if comparison.lines and study.description["code"]["packed_with"]["digest"] != code_digest():
        print(f"note: this is not the code that packed the study, which is that of {commit}")
    problems = (*study.changes, *moved, *comparison.lines, *comparison.figures)
    print("equal: the study's rows give its results" if not problems else "DIFFERENT: see above")
    return not problems


def _print_lines(title: str, lines: list[str]) -> None:
    for line in lines[:MAX_LINES]:
        print(f"{title}: {line}")
    if len(lines) > MAX_LINES:
        print(f"{title}: {len(lines) - MAX_LINES:,} more")


if __name__ == "__main__":
    sys.exit(main())
