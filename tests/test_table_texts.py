"""Texts of users in a sweep's tables: no formula in CSV, no markup in Markdown, LaTeX, HTML and on the terminal."""

import csv
import io
import warnings

import pandas as pd
import pytest

from benchmarks.aggregation import make_sweep
from sweeps.aggregate import aggregate
from sweeps.report.escapes import csv_text, latex_cell, markdown_cell

NASTY = "=a$x_{$ [/red] :smile: |`<b>&\\#~^% \N{GRINNING FACE} \ud83d\n*"


def cells(table):
    """Return the cells as a reader of CSV finds them."""
    return list(csv.reader(io.StringIO(csv_text(pd.DataFrame(table)).decode())))[1:]


@pytest.mark.parametrize("text", ["=1+1", "+1", "@x", "\t=1", "\r=1", "-cmd|' /C calc'!A0", "-1+1", "=", "-=x"])
def test_a_text_that_a_spreadsheet_would_run_begins_with_an_apostrophe(text):
    ((cell,),) = cells({"setup": [text]})
    assert cell == "'" + text.replace("\r", "\n")


def test_numbers_and_other_texts_are_as_they_are():
    row = {"a": [-0.5], "b": ["-0.123"], "c": ["-0.12 ± 0.30"], "d": ["-"], "e": ["dpo"], "f": ["'x"], "g": ["1=1"]}
    assert cells(row) == [["-0.5", "-0.123", "-0.12 ± 0.30", "-", "dpo", "'x", "1=1"]]


def test_markdown_and_latex_show_what_was_typed():
    assert markdown_cell("a|b`c`<d>&\ne\\") == r"a\|b\`c\`&lt;d>&amp; e\\"
    assert latex_cell("50% & $x_{1}$ #~^\\ ± <\n\n漢") == (
        r"50\% \& \$x\_\{1\}\$ \#\textasciitilde{}\textasciicircum{}\textbackslash{} $\pm$ \textless{}  漢"
    )
    assert latex_cell("[x]") == "{}[x]" and latex_cell("0.5 [0.4]") == "0.5 [0.4]"


def test_any_name_of_a_setup_passes_through_aggregation(tmp_path, capsys):
    folder = make_sweep(tmp_path, seeds=1, lrs=1, betas=1, setup=NASTY, methods=("dpo", "ipo"))
    record = folder.read()
    for number, point in enumerate(record["points"]):
        point["variant"] = f"dataset.path={NASTY}{number % 2}"
    folder.write(record)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        aggregate([folder])
    assert "[/red] :smile: |`<b>&" in capsys.readouterr().out
    points = pd.read_csv(folder.points_csv)
    assert points.setup.str.startswith("'=a$x_{$").all() and points.beta.map(type).eq(float).all()
    columns = {line.count(" | ") for line in (folder.tables / "best.md").read_text().splitlines()}
    assert len(columns) == 1, "one line a row, and as many cells in each"
    rows = [line for line in (folder.tables / "best.tex").read_text().splitlines() if r"\textgreater" in line]
    assert len(rows) > 1 and all(row.endswith(r"\\") and row.count(r"\&") == 1 for row in rows)
    report = folder.report.read_text()
    assert "<b>&\\" not in report and "&lt;b&gt;&amp;" in report


def test_quality_that_is_reward_accuracy_keeps_its_reporting_split_and_interval(tmp_path, capsys):
    common = {"seeds": 1, "lrs": 1, "betas": 3, "methods": ("dpo", "ipo")}
    aggregate([make_sweep(tmp_path / "control", **common)])
    assert "Win rate" in capsys.readouterr().out, "the control: another metric has its own name"
    folder = make_sweep(tmp_path / "accuracy", metric="reward_accuracy", **common)
    best = aggregate([folder]).set_index("method")
    cell = "{quality_reporting:.3f} [{quality_reporting_low:.3f}, {quality_reporting_high:.3f}]".format(
        **best.loc["dpo"]
    )
    output, table = capsys.readouterr().out, pd.read_csv(folder.tables / "best.csv").set_index("Method")
    assert (
        table["Reward accuracy"]["DPO"] == cell
        and table["Reward accuracy, all pairs"]["DPO"] == best.reward_accuracy["dpo"]
    )
    for text in (
        output,
        *((folder.tables / f"best.{end}").read_text() for end in ("md", "tex")),
        folder.report.read_text(),
    ):
        assert text.count("Reward accuracy") >= 1 and cell in text
    assert "all pairs" not in output and "<th>Reward accuracy, all pairs</th>" in folder.report.read_text()
