"""What trackers must not be given, and packages of theirs that are loaded only where they are used."""

import json
import subprocess
import sys

import pytest

from src.store.sweep_folder import SweepFolder
from tests.support import wandb_server
from tests.support.commands import ROOT, SMALL
from tests.support.tracked import run, shell


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


@pytest.mark.slow
def test_no_secret_reaches_a_tracker_or_any_file(tmp_path):
    canaries = {name: f"canary-{name.lower()}-0123456789" for name in ("OPENAI_API_KEY", "HF_TOKEN", "MY_KEY")}
    options = ["judge.api_key_env=MY_KEY", "tracking.tensorboard.enabled=true"]
    with wandb_server.serving() as server:
        done = run(server, *SMALL, f"output_dir={tmp_path}", *options, **canaries)
    assert done.returncode == 0, done.stderr
    secrets = [*canaries.values(), wandb_server.KEY]
    files = [path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()]
    bodies = [body for _, body in server.requests]
    assert len(files) > 20 and len(bodies) > 5
    for contents in (files, bodies, [done.stdout.encode(), done.stderr.encode()]):
        for secret in secrets:
            assert not any(secret.encode() in data for data in contents)
