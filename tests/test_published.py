"""The paper's tables beside one's own results: which of them a sweep is shown, and which point stands for a row."""

import math

import pandas as pd
import pytest

from sweeps.analysis.results import Results
from sweeps.report.published import published_points, published_tables

SETUP = "llama31_8b_uf"


def row(method, selection, reporting, init="sft", **settings):
    variant = " ".join(f"{key}={value}" for key, value in sorted(settings.items()))
    point = {"setup": SETUP, "method": method, "init": init, "variant": variant, "metric": "win_rate"}
    point |= {"quality_selection": selection, "quality_reporting": reporting, "quality_reporting_se": 0.01}
    return point | {"identities": [f"{method} {init} {variant}"]}, settings


def tables(rows, dataset, of=published_tables, **shared):
    results = Results([{"studies": []}], [])
    for point, settings in rows:
        study = {name: point[name] for name in ("setup", "method", "init")}
        results.sweeps[0]["studies"].append({**study, "settings": {"dataset.name": dataset} | shared})
        results.settings[point["identities"][0]] = settings
    return of(results, pd.DataFrame([point for point, _ in rows]))


def weights(sft_weight, align_weight):
    return {"init.sft_weight": sft_weight, "init.align_weight": align_weight}


ABLATION = [
    row("orpo", 0.60, 0.611, **weights(0.0, 1.0)),
    row("orpo", 0.50, 0.512, **weights(1.0, 1.0)),
    row("orpo", 0.55, 0.553, **weights(1.0, 0.1)),  # better by the selection split
    row("orpo", 0.40, 0.414, "base", **{"init.align_weight": 0.1, "trainer.align.epochs": 2.0}),
    row("orpo", 0.41, 0.405, "base", **{"init.align_weight": 1.0, "trainer.align.epochs": 1.0}),
    row("dpo", 0.70, 0.707),
]


def test_table_1_is_beside_the_best_point_of_each_of_its_rows():
    (table,) = tables(ABLATION, "ultrafeedback")
    assert table["source"].endswith("Table 1")
    cells = {name: (published, own) for name, published, *_, own in table["rows"]}
    assert cells == {
        "SFT": ("6.7 (0.43)", "-"),
        "ORPO": ("24.1 (0.84)", "0.611 ± 0.010"),
        "ASFT": ("16.4 (0.72)", "-"),
        "ORPO from the base model, with the SFT term": ("14.8 (0.71)", "0.405 ± 0.010"),
        "ASFT from the base model, with the SFT term": ("14.5 (0.73)", "-"),
        "ORPO, with the SFT term": ("13.4 (0.69)", "0.553 ± 0.010"),
        "ASFT, with the SFT term": ("11.4 (0.63)", "-"),
        "DPO": ("23.4 (0.85)", "0.707 ± 0.010"),
    }


def test_another_dataset_has_another_table_or_none():
    points = [row("dpo", 0.7, 0.707), row("orpo", 0.6, 0.611)]
    (table,) = tables(points, "ultrachat_ultrafeedback")
    assert table["source"].endswith("Table 2")
    assert {name: own for name, *_, own in table["rows"] if own != "-"} == {
        "DPO": "0.707 ± 0.010",
        "ORPO": "0.611 ± 0.010",
    }
    assert tables(points, "hh_rlhf") == []


def test_points_that_vary_in_anything_else_stand_for_no_row():
    (table,) = tables([row("dpo", 0.7, 0.7, **{"dataset.sft_fraction": 0.1})], "ultrachat_ultrafeedback")
    assert {own for *_, own in table["rows"]} == {"-"}


def as_points(rows, dataset="ultrachat_ultrafeedback", **judge):
    """Return method, beta -> quality and its error, of the published points of these selected ones."""
    shared = {f"judge.{name}": value for name, value in judge.items()}
    points = tables(rows, dataset, of=published_points, **shared).to_dict("records")
    return {(point["method"], point["beta"]): (point["quality"], point["quality_se"]) for point in points}


def tldr(*methods):
    return [(point | {"setup": "llama32_3b_tldr"}, settings) for point, settings in (row(m, 0.5, 0.5) for m in methods)]


def test_published_win_rates_are_points_at_the_published_betas():
    found = as_points([row("dpo", 0.7, 0.7), row("simpo", 0.6, 0.6)], name="alpaca_eval", baseline="/questions.json")
    assert found == {
        ("dpo", 0.003): (pytest.approx(0.2369), pytest.approx(0.0125)),
        ("simpo", 1.0): (pytest.approx(0.2562), pytest.approx(0.0129)),
    }


def test_a_tie_is_half_a_win_and_the_gain_of_tuning_gives_the_point_of_beta_1():
    found = as_points(tldr("dpo", "asft", "orpo"), "tldr", name="tldr", baseline="chosen")
    values = {point: round(quality, 4) for point, (quality, _) in found.items()}
    assert values == {
        ("dpo", 0.05): 0.917,
        ("asft", 0.001): 0.877,
        ("asft", 1.0): 0.443,
        ("orpo", 0.5): 0.905,
        ("orpo", 1.0): 0.835,
    }
    assert all(math.isnan(error) for _, error in found.values())


@pytest.mark.parametrize(
    ("rows", "dataset", "judge"),
    [
        (tldr("dpo"), "tldr", {"name": "tldr", "baseline": "sft"}),
        (tldr("dpo"), "tldr", {"name": "gold", "baseline": "chosen"}),
        (tldr("dpo"), "hh_rlhf", {"name": "tldr", "baseline": "chosen"}),
        ([row("dpo", 0.5, 0.5)], "ultrachat_ultrafeedback", {"name": "arena_hard", "baseline": "/answers.jsonl"}),
        ([row("dpo", 0.5, 0.5)], "ultrafeedback", {"name": "alpaca_eval", "baseline": "/questions.json"}),
        (
            [row("orpo", 0.5, 0.5, "base")],
            "ultrachat_ultrafeedback",
            {"name": "alpaca_eval", "baseline": "/questions.json"},
        ),
    ],
    ids=["other baseline", "other judge", "other data", "other score", "Table 1, without betas", "other init"],
)
def test_what_is_another_quantity_has_no_published_points(rows, dataset, judge):
    assert as_points(rows, dataset, **judge) == {}
