"""What a report says of results written as a sweep writes them."""

import re

import pandas as pd
import pytest

from benchmarks.aggregation import make_sweep
from src.methods import METHODS
from sweeps.aggregate import aggregate
from sweeps.report.plot_style import COLOURS, KINDS, MARKERS, STYLES

SETUP = "llama32_3b_tldr"


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """All methods over three betas and two learning rates, of a setup of the paper; the larger beta the better."""
    folder = tmp_path_factory.mktemp("made")
    make_sweep(folder, seeds=1, lrs=2, betas=3, setup=SETUP)
    best = aggregate([folder / "sweeps" / "made"], quiet=True)
    return folder / "sweeps" / "made", best, (folder / "sweeps" / "made" / "report.html").read_text()


def section(report, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', report, re.S)[1]


def test_the_papers_table_stands_beside_ours(made):
    _, best, report = made
    (row,) = re.findall(r"<tr><td[^>]*>ASFT</td>.*?</tr>", section(report, "published"), re.S)
    own = best.set_index("method").quality_reporting["asft"]
    assert "87.2 / 1.0 / 11.8" in row and f"{own:.3f}" in row


def test_another_setup_has_no_published_table(tmp_path):
    make_sweep(tmp_path, seeds=1, lrs=1, betas=2)
    aggregate([tmp_path / "sweeps" / "made"], quiet=True)
    assert 'id="published"' not in (tmp_path / "sweeps" / "made" / "report.html").read_text()


def test_ties_are_what_holm_leaves(made):
    folder, best, _ = made
    differences = pd.read_csv(folder / "tables" / "differences.csv")
    shown = pd.read_csv(folder / "tables" / "best.csv").set_index("Method")["To top"].astype(str)
    top = best.sort_values("quality_reporting").iloc[-1].method
    own = differences[(differences.method == top) | (differences.other == top)]
    assert (shown == "top").sum() == 1
    assert (shown == "tied").sum() == (own.p_holm >= 0.05).sum() == len(METHODS) - 1 - shown.str.startswith("-").sum()


def test_the_mean_of_the_three_best_stands_beside_the_best(made):
    folder, best, report = made
    points = pd.read_csv(folder / "points.csv")
    dpo = points[points.method == "dpo"].sort_values("quality_selection", ascending=False).head(3)
    assert best.set_index("method").top_reporting["dpo"] == pytest.approx(dpo.quality_reporting.mean())
    assert pd.read_csv(folder / "tables" / "best.csv").set_index("Method")["Top 3"]["DPO"] == pytest.approx(
        dpo.quality_reporting.mean(), abs=5e-4
    )
    assert "<th>Top 3</th>" in section(report, "best")


def test_every_cost_is_counted_once(made):
    _, _, report = made
    (row,) = re.findall(r">align</td>(.*?)</tr>", section(report, "cost"), re.S)
    points = 6 * len(METHODS)  # of a second each
    assert re.findall(r"<td>(.*?)</td>", row)[:2] == [f"{points}", f"{points / 3600:.3g}"]


def test_no_two_methods_of_a_kind_look_alike():
    for kind in KINDS:
        looks = [STYLES[method] for method, spec in METHODS.items() if spec.kind == kind]
        assert len(set(looks)) == len(looks) > 3
    assert len({(COLOURS[n % len(COLOURS)], MARKERS[n % len(MARKERS)]) for n in range(42)}) == 42


def test_names_from_outside_are_text(tmp_path):
    make_sweep(tmp_path, seeds=1, lrs=1, betas=2, setup="<script>alert(1)</script>")
    aggregate([tmp_path / "sweeps" / "made"], quiet=True)
    report = (tmp_path / "sweeps" / "made" / "report.html").read_text()
    assert "<script>alert(1)" not in report and "&lt;script&gt;alert(1)" in report
