"""Tables 1, 2 and 7 in the paper's layout: its own numbers as results of sweeps give its own tables."""

import re
import shutil
import subprocess

import pandas as pd
import pytest
import yaml

from src.config.schema import CONF_DIR
from sweeps.analysis.results import Results
from sweeps.report.paper_tables import paper_tables
from sweeps.report.plot_style import NAMES
from sweeps.report.published import FILE

PUBLISHED = yaml.safe_load(FILE.read_text())
UF_SETUPS = ("llama31_8b_uf", "llama32_3b_uf")
ALPACA, ARENA = ({"evaluation.name": name, "judge.name": name} for name in ("alpaca_eval", "arena_hard"))


def numbers(text):
    return [float(number) for number in re.findall(r"-?[\d.]+", text)]


def scores_of(texts):
    """Return AlpacaEval's scores and Arena-Hard's from the paper's cells LC, WR and AH."""
    lc, wr, ah = map(numbers, texts)
    low, high = ah[1:] or (-1.2, 1.2)
    return (
        {"win_rate": {"value": wr[0], "se": wr[1]}, "length_controlled_win_rate": {"value": lc[0], "se": lc[1]}},
        {"arena_hard": {"value": ah[0], "low": ah[0] + low, "high": ah[0] + high}},
    )


class Synthetic:
    """Selected points with scores, as sweeps that are aggregated together have them."""

    def __init__(self):
        self.results, self.points = Results([{"studies": []}], []), []

    def add(self, setup, method, scores, *, init="sft", beta=0.1, lr=1e-6, selection=0.5, **settings):
        identity = str(len(self.points))
        self.results.settings[identity], self.results.scores[identity] = settings, scores
        point = {"setup": setup, "method": method, "init": init, "variant": "any", "beta": beta, "lr": lr}
        point |= {"metric": "win_rate", "quality_selection": selection, "quality_reporting": 0.75}
        self.points.append(point | {"quality_reporting_se": 0.0125, "identities": [identity]})

    def tables(self):
        return paper_tables(self.results, pd.DataFrame(self.points))

    def frame(self, name):
        """Return a table as its CSV has it."""
        columns = self.tables()[name].columns
        titles = pd.MultiIndex.from_tuples(columns)
        return pd.DataFrame([[cell.text for cell in row] for row in self.tables()[name].rows], columns=titles)


@pytest.fixture(scope="module")
def two_setups():
    """The paper's Table 2 as results of four sweeps: two setups, each with two benchmarks."""
    synthetic = Synthetic()
    for setup in UF_SETUPS:
        best = yaml.safe_load((CONF_DIR / "setup" / f"{setup}.yaml").read_text())["setup"]["best"]
        (table,) = (t for t in PUBLISHED if t["setup"] == setup and t["source"].endswith("Table 2"))
        for row in table["rows"][1:]:
            for scores, evaluation in zip(scores_of(row["values"]), (ALPACA, ARENA), strict=True):
                synthetic.add(setup, row["method"], scores, **best[row["method"]], **evaluation)
    return synthetic


@pytest.fixture(scope="module")
def two_inits():
    """The paper's Table 1, with a worse point of another lambda for each row."""
    synthetic = Synthetic()
    (table,) = (t for t in PUBLISHED if t["source"].endswith("Table 1"))
    for row in table["rows"][1:]:
        init, weight = row.get("init", "sft"), float(row.get("sft_term", False))
        for scores, evaluation in zip(scores_of(row["values"]), (ALPACA, ARENA), strict=True):
            common = evaluation | {"init.sft_weight": weight, "trainer.align.epochs": 2.0}
            synthetic.add("llama31_8b_uf", row["method"], scores, init=init, **common, **{"init.align_weight": 0.2})
            worse = {name: score | {"value": score["value"] + 50} for name, score in scores.items()}
            options = {"init": init, "selection": 0.4, "beta": 9.0}
            synthetic.add("llama31_8b_uf", row["method"], worse, **options, **common, **{"init.align_weight": 1.0})
    return synthetic


def test_the_papers_numbers_give_its_table_2(two_setups):
    table = two_setups.frame("paper_table_2")
    assert list(table.columns[0]) == ["", "Method"]
    titles = ["LC% (std)", "WR% (std)", "AH% (CI)"]
    assert list(table.columns[1:]) == [(setup, title) for setup in UF_SETUPS for title in titles]
    for setup in UF_SETUPS:
        (of_paper,) = (t for t in PUBLISHED if t["setup"] == setup and t["source"].endswith("Table 2"))
        cells = sorted(map(tuple, table[setup].to_numpy().tolist()))
        assert cells == sorted(tuple(row["values"]) for row in of_paper["rows"][1:])


def test_the_best_of_a_column_is_bold_and_the_second_underlined_also_where_several_are_equal(two_setups):
    formats = two_setups.tables()["paper_table_2"].formats()
    bold, second = (re.findall(mark, formats["md"]) for mark in (r"\*\*(.*?)\*\*", "<ins>(.*?)</ins>"))
    expected = {"28.25 (0.71)", "28.59 (1.33)", "21.5 (-1.9, 1.9)", "11.43 (0.58)", "12.23 (0.97)"}
    assert set(bold) == expected | {"6.8 (-1.0, 0.9)", "6.8 (-1.0, 1.1)"} and len(bold) == 7
    assert set(second) == {
        *("28.18 (0.83)", "25.62 (1.29)", "20.9 (-2.0, 2.0)"),
        *("11.24 (0.60)", "11.94 (0.95)", "6.6 (-1.0, 1.1)"),
    }
    assert formats["tex"].count(r"\textbf{") == 7 and r"\underline{25.62 (1.29)}" in formats["tex"]
    assert b"28.25 (0.71)" in formats["csv"] and b"*" not in formats["csv"]
    assert formats["md"].startswith("| Method | llama31_8b_uf LC% (std) |")


def test_table_1_has_the_selected_point_of_every_init_and_sft_term(two_inits):
    table = two_inits.frame("paper_table_1")
    (of_paper,) = (t for t in PUBLISHED if t["source"].endswith("Table 1"))
    own = {(init, name): cells for init, name, *cells in table.to_numpy().tolist()}
    assert list(own) == [
        *(("SFT", "DPO"), ("SFT", "ORPO"), ("SFT", "ASFT")),
        *(("Base", "ORPO+"), ("Base", "ASFT+"), ("SFT", "ORPO+"), ("SFT", "ASFT+")),
    ]
    for row in of_paper["rows"][1:]:
        init, term = row.get("init", "sft"), "+" * row.get("sft_term", False)
        cells = own[{"sft": "SFT", "base": "Base"}[init], NAMES[row["method"]] + term]
        assert numbers(cells[0]) == numbers(row["values"][0]) and numbers(cells[1]) == numbers(row["values"][1])
        assert numbers(cells[2])[0] == numbers(row["values"][2])[0] and cells[2].endswith(" (-1.2, 1.2)")
    assert len(two_inits.frame("paper_table_2")) == 3, "Table 2 has the rows without an SFT term alone"


def test_table_7_is_the_published_one_when_its_best_values_are_selected(two_setups):
    table = two_setups.frame("paper_table_7")
    assert list(table.columns[1:]) == [(setup, name) for setup in UF_SETUPS for name in ("lr", "beta")]
    cells = dict(zip(table["", "Method"], table["llama31_8b_uf"].to_numpy().tolist(), strict=True))
    assert (
        cells["DPO"] == ["1e-06", "0.003"] and cells["SimPO"] == ["6e-07", "1"] and cells["NCA"] == ["3e-07", "0.0003"]
    )
    assert not {r"\textbf", r"\underline"} & set(
        re.findall(r"\\\w+", two_setups.tables()["paper_table_7"].formats()["tex"])
    )


def test_table_7_names_what_else_was_tuned_and_two_evaluations_that_select_differently():
    synthetic = Synthetic()
    for evaluation, lr in ((ALPACA, 1e-6), (ARENA, 3e-7)):
        synthetic.add("s", "dpo", {}, lr=lr, **evaluation)
        synthetic.add("s", "simpo", {}, lr=1e-6, **evaluation, **{"method.gamma_beta_ratio": 0.3})
    assert [title for _, title in synthetic.tables()["paper_table_7"].columns] == [
        *("Method", "lr, alpaca_eval", "beta", "other settings", "lr, arena_hard"),
    ]
    assert synthetic.frame("paper_table_7").iloc[1].tolist()[-2:] == ["gamma_beta_ratio=0.3", "1e-06"]


def test_settings_that_are_not_tuned_are_columns_of_their_own_in_order_of_their_numbers():
    synthetic = Synthetic()
    for fraction in (1.0, 0.03, 0.5):
        synthetic.add("s", "dpo", {}, **{"dataset.sft_fraction": fraction})
    table = synthetic.frame("paper_table_2")
    assert [group for group, _ in table.columns] == ["", *(f"s, sft_fraction={x}" for x in (0.03, 0.5, 1.0))]
    assert table.iloc[0].tolist() == ["DPO", *3 * ["75.00 (1.25)"]]


def test_a_table_without_rows_has_no_files_and_one_row_no_marks(two_setups):
    assert two_setups.tables()["paper_table_1"].formats() == {}
    synthetic = Synthetic()
    synthetic.add("s", "dpo", {})
    assert "**" not in synthetic.tables()["paper_table_2"].formats()["md"]


def test_a_point_that_was_not_judged_on_the_reporting_split_has_a_dash_and_no_mark():
    synthetic = Synthetic()
    for method in ("dpo", "ipo", "orpo"):
        synthetic.add("s", method, {})
    synthetic.points[0]["quality_reporting"] = float("nan")
    synthetic.points[2]["quality_reporting"] = 0.5
    cells = [row[1] for row in synthetic.tables()["paper_table_2"].marked]
    assert cells == [("-", ""), ("75.00 (1.25)", "best"), ("50.00 (1.25)", "second")]


@pytest.mark.skipif(
    shutil.which("pdflatex") is None, reason="needs pdflatex: apt-get install texlive-latex-recommended"
)
def test_pdflatex_compiles_the_tables(two_setups, two_inits, tmp_path):
    odd = Synthetic()
    odd.add("50%_a&b#c", "dpo", {}, **{"dataset.sft_fraction": 0.1})
    odd.add("[x]", "ipo", {"hard_prompt": {"value": 1.0, "low": 0.5, "high": 2.0}})
    tables = {
        f"{name}_{number}": table.formats()["tex"]
        for number, synthetic in enumerate((two_setups, two_inits, odd))
        for name, table in synthetic.tables().items()
        if table.rows
    }
    assert {name[:-2] for name in tables} == {f"paper_table_{number}" for number in (1, 2, 7)}
    for name, tex in tables.items():
        (tmp_path / f"{name}.tex").write_text(tex)
    inputs = "\n\n".join(rf"\noindent\input{{{name}}}\bigskip" for name in tables)
    preamble = (
        r"\documentclass{article}\usepackage[landscape,margin=1cm]{geometry}\usepackage{booktabs}\pagestyle{empty}"
    )
    source = f"{preamble}\\begin{{document}}\\small\n{inputs}\n\\end{{document}}\n"
    (tmp_path / "tables.tex").write_text(source)
    command = ["pdflatex", "-interaction=nonstopmode", "-halt-on-error", "tables.tex"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stdout[-2000:]
    assert (tmp_path / "tables.pdf").stat().st_size > 10_000 and "Overfull" not in done.stdout
    (tmp_path / "tables.tex").write_text(source.replace(r"\usepackage{booktabs}", ""))  # the control
    assert subprocess.run(command, cwd=tmp_path, capture_output=True, timeout=120).returncode != 0
