"""Write the page about the study: `python -m benchmarks.smollm2_study.page docs/smollm2_study.zip docs/smollm2.md`.

What was measured is taken from the archive, so that this command alone makes the page again; sizes are those of the
preset conf/sweep/smollm2_study.yaml.
"""

from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from typing import Any

import jinja2
import pandas as pd

from src.config.validation import check_folder
from src.errors import ConfigError, report_errors
from src.estimates.power import LEVEL
from src.store.files import atomic_write
from sweeps.arguments import ArgumentParser
from sweeps.report.tables import NAMES
from sweeps.study.archive import UnpackedStudy, unpack

TEMPLATE = Path(__file__).with_name("smollm2.md.jinja")


def page(study: UnpackedStudy) -> str:
    """Return the page about a study. Raises ConfigError for one of which points have no result."""
    folder, description = study.folder, study.description
    points = pd.read_csv(folder.points_csv)
    if (missing := int((points.state != "done").sum())) > 0:
        raise ConfigError(f"{folder.name}: {missing} of {len(points)} points have no result; run the sweep again first")
    differences = pd.read_csv(folder.tables / "differences.csv")
    template = jinja2.Environment(
        undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True, autoescape=False
    ).from_string(TEMPLATE.read_text(encoding="utf-8"))
    return template.render(
        name=folder.name,
        study=description,
        lr=points.lr.iloc[0],
        rows=point_rows(points),
        spread=seed_spread(points),
        differing=differing_methods(differences),
        num_compared=len(differences),
        best=(folder.tables / "best.md").read_text(encoding="utf-8").strip(),
        findings=findings(folder.tables / "diagnosis.csv"),
    )


def point_rows(points: pd.DataFrame) -> list[dict[str, Any]]:
    """Return a row of the table of all points for each method and beta: means over the seeds, as text."""
    rows = []
    for (method, beta), seeds in points.groupby(["method", "beta"], sort=False):
        mean = seeds.mean(numeric_only=True)
        rows.append(
            {
                "method": NAMES[method],
                "beta": f"{beta:g}",
                "selection": f"{mean.quality_selection:.3f}",
                "reporting": " / ".join(f"{value:.3f}" for value in seeds.sort_values("seed").quality_reporting),
                "margin": f"{mean.reward_margin:.3g}",
                "kl": f"{mean.kl_sequence_rb:.2f}",
                "tokens": f"{mean.response_tokens:.1f}",
                "capability": "-" if pd.isna(mean.capability_change) else f"{mean.capability_change:+.3f}",
            }
        )
    return rows


def seed_spread(points: pd.DataFrame) -> float:
    """Return the mean absolute difference of the reporting accuracies of the two seeds of a point."""
    of_seeds = points.pivot_table(index=["method", "beta"], columns="seed", values="quality_reporting")
    return float((of_seeds.max(axis=1) - of_seeds.min(axis=1)).mean())


def differing_methods(differences: pd.DataFrame) -> list[str]:
    """Return a sentence for each pair of selected points whose reporting accuracies differ beyond chance."""
    return [
        f"{NAMES[row['method']]} minus {NAMES[row['other']]}: {row['difference']:+.3f} "
        f"[{row['low']:+.3f}, {row['high']:+.3f}], p {row['p_holm']:.3f}"
        for row in differences[differences.p_holm < LEVEL].to_dict("records")
    ]


def findings(table: Path) -> list[dict[str, Any]]:
    """Return the findings of the report's diagnosis about selected points, methods and all, the worst first."""
    rows = pd.read_csv(table).query("selected").to_dict("records")
    for row in rows:
        point = [NAMES[row["method"]]] if isinstance(row["method"], str) else ["all"]
        row["where"] = " ".join([*point, *([f"beta {row['beta']:g}"] if row["beta"] == row["beta"] else [])])
    return rows


def main() -> int:
    parser = ArgumentParser(prog="python -m benchmarks.smollm2_study.page", description=__doc__)
    parser.add_argument("study", type=Path, help="the study.zip of +sweep=smollm2_study")
    parser.add_argument("page", type=Path, help="the page to write")
    arguments = parser.parse_args()
    with report_errors(), tempfile.TemporaryDirectory() as unpacked:
        study = unpack(arguments.study, Path(unpacked))
        if study.changes:
            raise ConfigError(f"{arguments.study}: {study.changes[0]}; get the study again")
        check_folder("page", str(arguments.page.absolute().parent))
        atomic_write(arguments.page, page(study))
    return 0


if __name__ == "__main__":
    sys.exit(main())
