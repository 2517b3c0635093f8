"""`open_study`: the tables and figures of a sweep in a notebook are those of its files; the notebook of docs/ runs."""

from __future__ import annotations

import gc
import json
import os
import random
import subprocess
import sys

import nbformat
import pandas as pd
import pytest
import yaml
from matplotlib.figure import Figure
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

import sweeps
from src.errors import ConfigError, DamagedFile
from src.store.store import METRICS_FILE, SAMPLES_FILE
from sweeps import open_study
from sweeps.notebook import KEYS
from tests.support.commands import ROOT, run_in_process
from tests.support.fake_sweep import FakeSweep
from tests.support.studies import edited

NOTEBOOK = ROOT / "docs" / "study.ipynb"


@pytest.fixture(scope="module")
def study(swept):
    return open_study(str(swept[0].path))


def test_points_and_best_are_those_of_the_files(study, swept):
    folder, _ = swept
    of_file = pd.read_csv(folder.points_csv, keep_default_na=False, na_values=[""])
    numbers = ["beta", "lr", "quality", "quality_selection", "quality_reporting", "kl_sequence"]
    assert list(study.points.columns) == list(of_file.columns)
    pd.testing.assert_frame_equal(study.points[[*numbers, "identity"]], of_file[[*numbers, "identity"]])
    best = yaml.safe_load(folder.best_yaml.read_text())["mini_tldr"]
    assert len(study.best) == 2
    for row in study.best.to_dict("records"):
        entry = best[row["method"]]
        names = ("beta", "lr", "quality_reporting", "quality_reporting_low", "quality_reporting_high", "identities")
        assert {name: row[name] for name in names} == {name: entry[name] for name in names}


def test_quality_of_prompts_and_verdicts_of_samples_average_to_the_points(study):
    points = study.points.set_index("identity")
    by_split = study.prompts.groupby(["identity", "split"]).quality.mean().unstack()
    for split in ("selection", "reporting"):
        assert by_split[split].to_dict() == pytest.approx(points[f"quality_{split}"].to_dict())
    samples = study.samples
    assert samples.groupby("identity").verdict.mean().to_dict() == pytest.approx(points.quality.to_dict())
    assert (samples.groupby("identity").size() == 16).all() and samples.response.str.len().gt(0).any()
    assert set(samples.prompt_index) == set(study.prompts.prompt_index)
    joined = study.prompts.merge(samples, on=[*KEYS, "prompt_index"], validate="one_to_one")
    assert (joined.quality == joined.verdict).all() and len(joined) == len(samples)


def test_metrics_are_those_of_alignment(study):
    assert (study.metrics.groupby(KEYS, dropna=False).size() == 8).all()
    folder = study.results.artifacts(study.points.identity[2], "align")
    lines = [json.loads(line) for line in (folder / METRICS_FILE).read_text().splitlines()]
    rows = study.metrics[study.metrics.identity == study.points.identity[2]]
    assert list(rows["rewards/margins"]) == [line["rewards/margins"] for line in lines]


def test_figures_are_those_of_the_report(study, swept, tmp_path):
    folder, _ = swept
    assert sorted(study.figures) == sorted(path.stem for path in folder.figures.glob("*.svg"))
    figure = study.figure("quality_over_beta")
    assert isinstance(figure, Figure) and figure.drawing.name == "mini_tldr_quality_over_beta"
    figure.drawing.save(tmp_path)
    for path in tmp_path.iterdir():
        assert path.read_bytes() == (folder.figures / path.name).read_bytes(), path.name
    figure.suptitle("changed")
    assert "changed" in figure._repr_html_() and "changed" not in study.figure(figure.drawing.name)._repr_html_()


def test_a_figure_is_shown_in_the_colors_of_the_page_with_tooltips(study):
    shown = study.figure("quality_over_beta")._repr_html_()
    assert shown.startswith('<svg fill="currentColor"') and "#000000" not in shown
    assert shown.count("<title>") == 4 and "<title>DPO, beta 0.1, lr 0.001" in shown and "data-tip" not in shown


@pytest.mark.parametrize("name", ["quality", "over_bet", "", "quality_over_gamma"])
def test_a_figure_that_is_not_there_is_refused_with_the_names_of_all(study, name):
    with pytest.raises(ConfigError, match=r"unknown; the figures of four are mini_tldr_quality_over_beta, ") as error:
        study.figure(name)
    assert all(one in str(error.value) for one in study.figures)


def test_the_display_has_the_best_table_and_the_names(study):
    shown = study._repr_html_()
    assert "<b>four</b>: 4 points: 4 done" in shown and "<td>DPO</td>" in shown and "Win rate" in shown
    assert all(f"<code>{name}</code>" in shown for name in [*study.figures, "points", "samples"])
    assert repr(study) == "Study four: 4 points: 4 done"


def test_a_study_can_be_selected_by_another_rule_and_joined_with_others(swept, study):
    path = swept[0].path
    assert open_study(path, select="lowest_kl_in_shortlist").best.kl_sequence.sum() <= study.best.kl_sequence.sum()
    assert len(open_study(path, path).points) == 4, "a point of several sweeps is one row"
    with pytest.raises(ConfigError, match="select=no: unknown, use one of best, lowest_kl_in_shortlist"):
        open_study(path, select="no")


def test_a_study_zip_is_as_its_sweep(swept, study, tmp_path):
    packed = tmp_path / "study.zip"
    done = run_in_process(swept[0].path, "--out", packed, module="sweeps.pack")
    assert done.returncode == 0, done.stderr
    unpacked = open_study(packed)
    for name in ("points", "best", "prompts", "metrics", "samples"):
        whole, table = getattr(study, name), getattr(unpacked, name)
        assert table.columns.tolist() == whole.columns.tolist() and len(table) == len(whole) > 0
        without = ["checkpoint"] if "checkpoint" in whole else []
        pd.testing.assert_frame_equal(table.drop(columns=without), whole.drop(columns=without))
    assert unpacked.points.checkpoint.isna().all() and study.points.checkpoint.notna().all()
    assert unpacked.figures == study.figures
    folder = unpacked.results.temporary
    assert folder.is_dir()
    del unpacked
    gc.collect()
    assert not folder.exists(), "it is removed with the object"
    changed = edited(packed, tmp_path / "changed.zip", {"sweeps/four/best.yaml": lambda text: text + " "})
    with pytest.raises(ConfigError, match=r"changed\.zip: sweeps/four/best\.yaml was changed"):
        open_study(changed)


def test_what_is_no_study_is_one_line(tmp_path):
    with pytest.raises(ConfigError, match=r"no sweep\.json in it; give a sweep's folder"):
        open_study(tmp_path)
    with pytest.raises(ConfigError, match="open_study: no folder"):
        open_study()


def test_of_an_unfinished_sweep_there_is_what_is_done(tmp_path):
    sweep = FakeSweep(tmp_path, random.Random(0), variants=("", "x=1"))
    study = open_study(sweep.folder.path)
    assert len(study.points) == 24 and study.figures == []
    for table in (study.best, study.prompts, study.metrics, study.samples):
        assert len(table) == 0 and "method" in table
    assert "24 to do" in study._repr_html_()
    with pytest.raises(ConfigError, match="none, as no point is done"):
        study.figure("quality_over_beta")
    for point in sweep.points[:6]:
        sweep.evaluate(point)
    study = open_study(sweep.folder.path)
    assert repr(study) == "Study fake: 24 points: 18 to do, 6 done" and study.prompts.identity.nunique() == 6
    assert len(study.samples) == 0, "it has no file of samples"
    samples = sweep.store.root / "generate" / sweep.points[0]["stages"]["generate"] / SAMPLES_FILE
    samples.parent.mkdir(parents=True)
    samples.write_text("not a row\n")
    with pytest.raises(DamagedFile, match=r"samples\.jsonl, line 1"):
        _ = open_study(sweep.folder.path).samples


def test_a_name_that_several_figures_have_is_refused(tmp_path):
    sweep = FakeSweep(tmp_path, random.Random(0), variants=("", "x=1"))
    for point in sweep.points:
        sweep.evaluate(point)
    study = open_study(sweep.folder.path)
    with pytest.raises(ConfigError, match="2 have this name, use one of s_lr_and_beta, s_x=1_lr_and_beta"):
        study.figure("lr_and_beta")
    assert study.figure("s_lr_and_beta").drawing.name == "s_lr_and_beta"


def test_other_commands_do_not_import_what_a_notebook_needs():
    code = (
        "import sys, sweeps; assert 'pandas' not in sys.modules; sweeps.open_study; assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)
    with pytest.raises(AttributeError, match="has no attribute 'no_such_name'"):
        _ = sweeps.no_such_name


def run_notebook(study, tmp_path, monkeypatch):
    monkeypatch.setenv("STUDY", os.fspath(study))
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path))
    notebook = nbformat.read(NOTEBOOK, as_version=4)
    NotebookClient(notebook, timeout=120, resources={"metadata": {"path": str(NOTEBOOK.parent)}}).execute()
    return notebook


@pytest.mark.slow
def test_the_notebook_of_the_docs_runs(swept, tmp_path, monkeypatch):
    notebook = run_notebook(swept[0].path, tmp_path, monkeypatch)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    shown = ["".join(output.get("data", {}).get("text/html", "") for output in cell.outputs) for cell in code]
    assert all(shown), "every cell shows something"
    assert "Win rate" in shown[0] and sum("<svg" in text for text in shown) == 2
    with pytest.raises(CellExecutionError, match=r"no sweep\.json in it"):
        run_notebook(tmp_path, tmp_path, monkeypatch)


def test_the_notebook_is_committed_without_outputs():
    cells = json.loads(NOTEBOOK.read_text())["cells"]
    assert not any(cell.get("outputs") or cell.get("execution_count") for cell in cells)
