"""docs/add-a-judge.md, worked through."""

import json

import pytest

from tests.support.commands import SMALL
from tests.support.worked_example import WorkedExample


@pytest.mark.slow
def test_the_page_adds_a_judge_up_to_the_report(tmp_path):
    example = WorkedExample("add-a-judge.md", tmp_path / "project")
    refused = example.run("src.train", "judge=shorter", "dry_run=true")
    assert refused.returncode == 2 and "judge/shorter" in refused.stderr  # without the page
    example.apply()
    more = {
        "src.train": [*SMALL, f"output_dir={tmp_path}"],
        "pytest": ["-k", "fewer_words or every_key_of_every_config or choices"],
    }
    _, tests, run, sweep = example.run_commands(more)
    assert "3 passed" in tests and "win_rate" in run and "DPO" in sweep

    # A point of the sweep is the single run; its evaluation is reused.
    evaluations = sorted((tmp_path / "store" / "evaluate").glob("*/result.json"))
    assert len(evaluations) == 2
    for path in evaluations:
        result = json.loads(path.read_text())
        assert result["judge"]["name"] == "shorter"
        verdicts = [json.loads(line) for line in path.with_name("judgements.jsonl").open()]
        assert all(" words against " in verdict["reason"] for verdict in verdicts)
        mean = sum(verdict["verdict"] for verdict in verdicts) / len(verdicts)
        assert result["quality"]["metric"] == "win_rate" and abs(result["quality"]["value"] - mean) < 1e-12
    assert " words against " in (tmp_path / "sweeps" / "shorter" / "report.html").read_text()
