"""Compare a run of the demo with the recorded one: `python -m benchmarks.demo_figures outputs/sweeps/demo`.

recorded/demo_points.csv is points.csv of `python -m src.train -m +sweep=demo` at commit 456570e. A change that is not
meant to change results must give the same points, each win rate within two standard errors of the recorded one, and a
mean difference below .005. The exit code is 1 otherwise.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import pandas as pd

from src.errors import report_errors
from src.store.sweep_folder import SweepFolder

RECORDED = Path(__file__).with_name("recorded") / "demo_points.csv"
POINT = ["method", "beta", "lr", "seed"]
MAX_STANDARD_ERRORS, MAX_MEAN_DIFFERENCE = 2.0, 0.005


def differences(points: pd.DataFrame, recorded: pd.DataFrame) -> pd.DataFrame:
    """Return one row per point of either table; `difference`: of quality to the recorded one, NaN without both."""
    columns = [*POINT, "quality", "quality_se", "kl_sequence"]
    table = points[columns].merge(recorded[columns], how="outer", on=POINT, suffixes=("", "_recorded"))
    table["difference"] = table.quality - table.quality_recorded
    table["standard_errors"] = table.difference.abs() / table.quality_se_recorded
    return table.sort_values("standard_errors", ascending=False, na_position="first", ignore_index=True)


def violations(table: pd.DataFrame) -> list[str]:
    """Return one line for each requirement that is not met. table: of differences."""
    missing = int(table.difference.isna().sum())
    large = int((table.standard_errors > MAX_STANDARD_ERRORS).sum())
    mean = table.difference.mean()
    lines = {
        f"{missing} points are missing in one of the two": missing > 0,
        f"{large} win rates differ by more than {MAX_STANDARD_ERRORS:g} standard errors": large > 0,
        f"the mean difference {mean:+.4f} is not below {MAX_MEAN_DIFFERENCE:g}": not abs(mean) < MAX_MEAN_DIFFERENCE,
    }
    return [line for line, is_violated in lines.items() if is_violated]


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.demo_figures", description=__doc__)
    parser.add_argument("dir", help="folder of the sweep")
    with report_errors():
        folder = SweepFolder.open(parser.parse_args().dir)
        table = differences(pd.read_csv(folder.points_csv), pd.read_csv(RECORDED))
        print(table.head(10).to_string(float_format="{:.4g}".format))
        print(f"{len(table)} points, mean difference {table.difference.mean():+.4f}")
        for line in (lines := violations(table)):
            print(line, file=sys.stderr)
    return 1 if lines else 0


if __name__ == "__main__":
    sys.exit(main())
