"""The table of a sweep's SFT models."""

from pathlib import Path

import pandas as pd

from sweeps.analysis.results import COLUMNS, Results
from sweeps.report.tables import sft_table


def results(*points):
    """points: (identity of the SFT model, seed, settings of the point, loss)."""
    rows, found = [], Results([], [])
    for number, (sft, seed, settings, loss) in enumerate(points):
        identity = f"result{number}"
        found._stages_of[identity] = (Path("store"), {"sft": sft, "align": f"align{number}"})
        found.settings[identity] = settings
        rows.append(
            {"setup": "s", "seed": seed, "identity": identity, "sft_validation_loss": loss}
            | {"sft_validation_loss_se": 0.1, "variant": f"everything of point {number}"}
        )
    found.points = pd.DataFrame(rows, columns=COLUMNS)
    return found


def test_an_sft_model_is_one_line_with_its_seed_and_what_it_depends_on():
    half, whole = {"dataset.sft_fraction": 0.5}, {"dataset.sft_fraction": 1.0}
    table = sft_table(
        results(
            ("a", 0, half | {"method.alpha": 1, "dataset.train_size": 8}, 1.5),
            ("a", 0, half | {"method.alpha": 2, "dataset.train_size": 9}, 1.5),
            ("b", 1, half | {"method.alpha": 1}, 1.5),  # of the same loss, by chance
            ("c", 0, whole | {"method.alpha": 1, "dataset.columns": ["x"]}, 1.25),
            ("base", 0, whole, None),
        )
    )
    assert table.to_dict("records") == [
        {"Setup": "s", "Seed": seed, "Settings": settings, "SFT validation loss": f"{loss} ± 0.100"}
        for seed, settings, loss in (
            ("0", "dataset.sft_fraction=0.5", "1.500"),
            ("1", "dataset.sft_fraction=0.5", "1.500"),
            ("0", "dataset.columns=['x'] dataset.sft_fraction=1.0", "1.250"),
        )
    ]


def test_columns_that_say_nothing_are_left_out():
    (row,) = sft_table(results(("a", 0, {}, 1.5), ("a", 0, {}, 1.5))).to_dict("records")
    assert row == {"Setup": "s", "SFT validation loss": "1.500 ± 0.100"}
    assert sft_table(results(("a", 0, {}, None))).empty
