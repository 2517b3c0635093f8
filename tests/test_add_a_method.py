"""The blocks and commands of docs/add-a-method.md add a method."""

import re

import pytest
import yaml

from src.methods import COMPARED
from tests.support.commands import ROOT, SMALL
from tests.support.worked_example import WorkedExample


@pytest.mark.slow
def test_the_page_adds_a_method_up_to_the_report(tmp_path):
    example = WorkedExample("add-a-method.md", tmp_path / "project")
    refused = example.run("src.train", "method=focalpo", f"output_dir={tmp_path}", "dry_run=true")
    assert refused.returncode == 2 and "focalpo" in refused.stderr  # the negative control: unknown before
    example.apply()

    # Only tests of methods: without TRL's trainers and the rest of conf/.
    arguments = {
        "src.train": [*SMALL, f"output_dir={tmp_path}"],
        "pytest": ["-k", "(focalpo or table or numbers or every_method) and not trl"],
    }
    _, benchmark, tests, one, sweep, options, demo = example.run_commands(arguments)

    assert re.search(r"^\| FocalPO \| 0\.", benchmark, re.M)
    assert int(re.search(r"(\d+) passed", tests)[1]) > 20
    assert "result.json" in one
    assert re.search(r"│ FocalPO +│", sweep) and re.search(r"│ DPO +│", sweep)
    folder = tmp_path / "sweeps" / "focal"
    assert set(yaml.safe_load((folder / "best.yaml").read_text())["mini_tldr"]) == {"dpo", "focalpo"}
    assert "FocalPO" in (folder / "report.html").read_text()
    for gamma in ("0.0", "0.05", "0.5"):
        assert f"focalpo beta=0.1 lr=0.001 method.focal_gamma={gamma}" in options
    assert len(re.findall(r"^(?:to do|done) +\w+  \S+  focalpo ", demo, re.M)) == 6
    beta_grid = yaml.safe_load((ROOT / "conf/beta_grid/mini_tldr.yaml").read_text())
    assert f"{sum(len(beta_grid[method]) for method in COMPARED) + 6} points" in demo
