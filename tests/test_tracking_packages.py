"""Packages of trackers are loaded where they are used, and asked for by name."""

import json
import subprocess
import sys

import pytest

from src.store.sweep_folder import SweepFolder
from tests.support.commands import ROOT
from tests.support.tracked import shell


def test_a_dashboard_in_wandb_without_its_package_is_one_line(monkeypatch, tmp_path):
    from src.errors import ConfigError
    from sweeps import dashboard

    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"wandb_workspaces: pip install '\.\[dashboards\]'"):
        dashboard.save(SweepFolder(tmp_path), None, None, None)


def test_planning_and_training_import_no_tracker():
    code = "import json, sys, src.train, sweeps.search.search, src.stages.align\nprint(json.dumps(sorted(sys.modules)))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, env=shell(), capture_output=True, text=True, check=True
    )
    assert {"wandb", "tensorboard"}.isdisjoint(json.loads(done.stdout))
