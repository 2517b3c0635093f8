"""The report of results in the format of a sweep, and which results are refused."""

import json
import re

import pandas as pd
import pytest

from benchmarks.aggregation import make_sweep
from src.methods import COMPARED, METHODS
from src.store.files import with_checksum, write_json
from src.store.integrity import describe_files
from sweeps.aggregate import aggregate
from sweeps.report.plot_style import COLORS, KINDS, MARKERS, STYLES
from sweeps.report.tables import ALL_PAIRS, benchmark_table

SETUP = "llama32_3b_tldr"


@pytest.fixture(scope="module")
def aggregated(tmp_path_factory):
    """All methods over three betas and two learning rates, of a setup of the paper; a larger beta is better."""
    folder = make_sweep(tmp_path_factory.mktemp("synthetic"), seeds=1, lrs=2, betas=3, setup=SETUP)
    best = aggregate([folder], quiet=True)
    return folder, best, folder.report.read_text()


def section(report, name):
    return re.search(rf'<section id="{name}">(.*?)</section>', report, re.S)[1]


def test_the_report_has_the_papers_results_of_the_same_setup(aggregated):
    _, best, report = aggregated
    (row,) = re.findall(r"<tr><td[^>]*>ASFT</td>.*?</tr>", section(report, "published"), re.S)
    quality = best.set_index("method").quality_reporting["asft"]
    assert "87.2 / 1.0 / 11.8" in row and f"{quality:.3f}" in row


def test_another_setup_has_no_published_table(tmp_path):
    folder = make_sweep(tmp_path, seeds=1, lrs=1, betas=2)
    aggregate([folder], quiet=True)
    assert 'id="published"' not in folder.report.read_text()


def test_methods_without_a_significant_difference_are_marked(aggregated):
    folder, best, _ = aggregated
    differences = pd.read_csv(folder.tables / "differences.csv")
    gaps = pd.read_csv(folder.tables / "best.csv").set_index("Method")["Gap to best"].astype(str)
    top = best.sort_values("quality_reporting").iloc[-1].method
    with_top = differences[(differences.method == top) | (differences.other == top)]
    num_significant = gaps.str.startswith("-").sum()
    assert (gaps == "best").sum() == 1
    assert (gaps == "n.s.").sum() == (with_top.p_holm >= 0.05).sum() == len(COMPARED) - 1 - num_significant


def test_the_mean_of_the_three_best_points_is_reported(aggregated):
    folder, best, report = aggregated
    points = pd.read_csv(folder.points_csv)
    dpo = points[points.method == "dpo"].sort_values("quality_selection", ascending=False).head(3)
    assert best.set_index("method").top3_reporting["dpo"] == pytest.approx(dpo.quality_reporting.mean())
    assert pd.read_csv(folder.tables / "best.csv").set_index("Method")["Top 3"]["DPO"] == pytest.approx(
        dpo.quality_reporting.mean(), abs=5e-4
    )
    assert "<th>Top\u00a03</th>" in section(report, "best")


def test_every_cost_is_counted_once(aggregated):
    _, _, report = aggregated
    (row,) = re.findall(r">align</td>(.*?)</tr>", section(report, "cost"), re.S)
    points = 6 * len(COMPARED)  # of a second each
    assert re.findall(r"<td>(.*?)</td>", row)[:3] == [f"{points}", f"{points / 3600:.3g}", "0"]


def test_no_two_methods_of_a_kind_have_the_same_style():
    for kind in KINDS:
        styles = [STYLES[method] for method, spec in METHODS.items() if spec.kind == kind]
        assert len(set(styles)) == len(styles) > 3
    assert len({(COLORS[n % len(COLORS)], MARKERS[n % len(MARKERS)]) for n in range(42)}) == 42


def test_the_table_of_benchmarks_has_their_scores_averaged_over_seeds():
    common = {"setup": "s", "init": "sft", "variant": "", "beta": 0.1, "lr": 1e-6}
    best = pd.DataFrame(
        [common | {"method": "dpo", "identities": ["a", "b"]}, common | {"method": "ipo", "identities": ["c"]}]
    )
    scores = {
        "a": {"arena_hard": {"value": 20, "low": 18, "high": 23}},
        "b": {"arena_hard": {"value": 30, "low": 26, "high": 35}},
    }
    table = benchmark_table(best, scores | {"c": {}})
    assert table.to_dict("records") == [
        {"Method": "DPO", "beta": "0.1", "lr": "1e-06", "Arena hard %": "25.0 (-3.0, +4.0)"}
    ]
    assert not len(benchmark_table(best, {}))


def test_measurements_by_source_and_of_sft_are_in_the_tables_and_the_report(tmp_path):
    folder = make_sweep(tmp_path, seeds=2, lrs=1, betas=2, setup=SETUP)
    for number, path in enumerate(sorted(folder.path.parents[1].glob("store/evaluate/*/result.json"))):
        done, result = json.loads((path.parent / "DONE").read_text()), json.loads(path.read_text())
        values = {"value": 0.25 + number % 2 / 2, "se": 0.1, "n": 4}
        result["sources"] = {"hh<1>": {"quality": values, "reward_accuracy": values}, "ultra": {"quality": values}}
        result["sft_validation_loss"] = {"value": 1.5, "se": 0.125, "n": 8}
        path.write_text(json.dumps(result))
        done["files"] |= {name: entry for name, entry in describe_files(path.parent).items() if name == "result.json"}
        write_json(path.parent / "DONE", with_checksum({k: v for k, v in done.items() if k != "checksum"}))
    best = aggregate([folder], quiet=True)
    points, table = pd.read_csv(folder.points_csv), pd.read_csv(folder.tables / "sources.csv")
    assert (points.sft_validation_loss == 1.5).all() and (points.sft_validation_loss_se == 0.125).all()
    assert list(table.Source[:2]) == ["hh<1>", "ultra"] and len(table) == 2 * len(best)
    assert set(table["Win rate"]) <= {"0.250 ± 0.100", "0.500 ± 0.100", "0.750 ± 0.100"}
    assert set(table[ALL_PAIRS][1::2]) == {"-"}, "what a source has none of"
    assert pd.read_csv(folder.tables / "sft.csv").to_dict("records") == [
        {"Setup": SETUP, "SFT validation loss": "1.500 ± 0.125"}
    ]
    report = folder.report.read_text()
    assert section(report, "sources").count("hh&lt;1&gt;</td>") == len(best) and "1.500 ± 0.125" in section(
        report, "best"
    )


def test_a_sweep_of_one_table_without_sft_validation_has_neither(aggregated):
    folder, _, report = aggregated
    assert 'id="sources"' not in report and "SFT models" not in report
    assert not {"sources.csv", "sft.csv"} & {path.name for path in folder.tables.iterdir()}
