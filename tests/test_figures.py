"""Figures of tables at the edge: one value, no value, names that matplotlib would read as formulas. No warnings."""

import re
import warnings

import pandas as pd
import pytest

from src.methods import METHODS
from sweeps.analysis.selection import average_seeds, best_points
from sweeps.report import figures
from tests.support.tables import points

NAN = float("nan")


VERDICT_COLUMNS = ["setup", "method", "init", "variant", "beta", "lr", "win", "tie", "lose", "prompts", "judge"]


PUBLISHED_COLUMNS = ["setup", "init", "variant", "method", "beta", "quality", "quality_se", "source"]


def draw(folder, *rows, verdicts=(), published=()):
    """Draw and save every figure of these points, a warning being an error; return stem -> SVG."""
    table = points(*rows).assign(metric="win_rate", checkpoint="/nowhere")
    averages = average_seeds(table.assign(kind=[METHODS[method].kind for method in table.method]))
    quality = best_points(averages).quality_reporting
    best = best_points(averages).assign(quality_reporting_low=quality - 0.1, quality_reporting_high=quality + 0.1)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        of_paper = pd.DataFrame(published, columns=PUBLISHED_COLUMNS)
        drawings = figures.draw(averages, best, pd.DataFrame(verdicts, columns=VERDICT_COLUMNS), of_paper)
        return {drawing.name: drawing.save(folder) for drawing in drawings}


EDGES = {
    "one point": [{"beta": 0.1}],
    "one lr of two betas": [{"beta": 0.1}, {"beta": 1.0}],
    "one beta of two learning rates": [{"beta": 0.1, "lr": 1e-3}, {"beta": 0.1, "lr": 1e-4}],
    "no KL": [{"beta": 0.1, "kl_sequence": NAN, "kl_sequence_se": NAN}],
    "negative KL": [{"beta": 0.1, "kl_sequence": -0.1}, {"beta": 1.0, "kl_sequence": 0.0}],
    "negative KL of one kind": [{"beta": 0.1, "kl_sequence": -1.0}, {"beta": 0.1, "method": "asft"}],
    "no errors": [{"beta": 0.1, "quality_reporting_se": NAN, "kl_sequence_se": NAN}],
}


@pytest.mark.parametrize("rows", EDGES.values(), ids=EDGES)
def test_one_value_or_none_is_drawn_without_a_warning(rows, tmp_path):
    drawn = draw(tmp_path, *rows)
    assert {f"{name}.png" for name in drawn} == {path.name for path in tmp_path.glob("*.png")} and len(drawn) >= 2
    has_kl = any(row.get("kl_sequence", 0.5) > 0 for row in rows)
    assert ("no value above 0" in drawn["s_quality_over_kl"]) == (not has_kl)


def test_points_that_failed_or_were_not_judged_on_the_reporting_prompts_are_not_drawn(tmp_path):
    unjudged = {"beta": 0.1, "quality_reporting": NAN, "quality_reporting_se": NAN}
    assert draw(tmp_path, {"beta": 0.1, "state": "failed"}, unjudged) == {}
    assert draw(tmp_path, unjudged, {"beta": 1.0})


@pytest.mark.parametrize("name", ["a$x_{$", "\\$", "_<b>&amp;", "😀", "שלום\u202e", "\x00\n", "s" * 3000, "漢" * 300])
def test_any_name_is_text_in_titles_and_labels(name, tmp_path):
    rows = [{"setup": name, "variant": f"dataset.path={name}{end}", "beta": 0.1} for end in ("1", "2")]
    drawn = draw(tmp_path, *rows, *[row | {"beta": 1.0, "quality_selection": 0.4} for row in rows])
    assert len(drawn) == 5 and all(path.stat().st_size for path in tmp_path.iterdir())
    (labels,) = (svg for stem, svg in drawn.items() if stem.endswith("_side_by_side"))
    assert re.findall(r"[12](?=</text>)", labels).count("1") >= 1, "the end of a label tells two variants apart"


def test_names_that_make_equal_file_names_do_not_overwrite_each_other(tmp_path):
    drawn = draw(tmp_path, {"setup": "a b", "beta": 0.1}, {"setup": "a_b", "beta": 0.1})
    assert len(drawn) == len(list(tmp_path.glob("*.svg"))) == 4
    assert "a_b_quality_over_beta" in drawn


def test_wins_ties_and_losses_are_bars_with_most_wins_on_top_and_a_number_where_it_fits(tmp_path):
    shares = {"dpo": (55.5, 2.5, 42.0), "asft": (71.5, 28.5, 0.0), "ipo": (60.0, 20.0, 20.0)}
    points = [{"method": method, "beta": 0.1} for method in shares]
    verdicts = [("s", method, "sft", "", 0.1, 1e-3, *share, 200, "gold") for method, share in shares.items()]
    assert "s_win_tie_lose" not in draw(tmp_path, *points)  # the control
    svg = draw(tmp_path, *points, verdicts=verdicts)["s_win_tie_lose"]
    texts = re.findall(r"<text[^>]*>([^<]*)</text>", svg)
    assert [text for text in texts if text in ("DPO", "ASFT", "IPO")] == ["DPO", "IPO", "ASFT"]  # from below
    numbers = [text for text in texts if re.fullmatch(r"\d+\.\d", text)]
    assert numbers == ["55.5", "42.0", "60.0", "20.0", "20.0", "71.5", "28.5"]
    assert "DPO, beta 0.1, lr 0.001\ntie 2.5 %" in svg and "200 reporting prompts" in svg


def test_published_results_are_faint_marks_over_beta_and_faint_lines_over_kl(tmp_path):
    rows = [{"method": "orpo", "beta": beta} for beta in (0.1, 0.2)] + [{"method": "asft", "beta": 0.1}]
    published = [
        ("s", "sft", "", "orpo", 0.5, 0.905, NAN, "Table 2"),
        ("s", "sft", "", "orpo", 1.0, 0.835, NAN, "gain"),
    ]
    published += [
        ("s", "sft", "", "asft", 0.001, 0.2, 0.01, "Table 2"),
        ("other", "sft", "", "orpo", 3.0, 0.7, NAN, ""),
    ]
    without, drawn = draw(tmp_path, *rows), draw(tmp_path, *rows, published=published)
    faint = {name: drawn[name].count("opacity: 0.4") for name in drawn}
    assert faint["s_quality_over_beta"] > faint["s_quality_over_kl"] == 2
    assert not any("opacity: 0.4" in svg or "Table 2" in svg for svg in without.values())  # the control
    for text in ("ORPO, beta 0.5\n0.905 (Table 2)", "ORPO, beta 1\n0.835 (gain)", "ASFT, beta 0.001\n0.200 (Table 2)"):
        assert text in drawn["s_quality_over_beta"]
    assert "ORPO\n0.905 (Table 2)" in drawn["s_quality_over_kl"] and "no KL published" in drawn["s_quality_over_kl"]
    assert "beta 3" not in drawn["s_quality_over_beta"]
