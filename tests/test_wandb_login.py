"""Where a W&B login is found, and runs without one."""

import os

import pytest

from src.config.schema import WandbTracking
from src.store.sweep_folder import SweepFolder
from src.tracking.wandb_login import WandbTarget, logged_in, resolve_target
from tests.support import wandb_server
from tests.support.commands import SMALL
from tests.support.tracked import metrics_of, offline_history, run, training_rows


def test_a_login_is_found_where_the_wandb_client_stores_it(tmp_path, monkeypatch):
    for name in [name for name in os.environ if name.startswith("WANDB_")]:
        monkeypatch.delenv(name)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    enabled = WandbTracking(enabled=True)
    assert resolve_target(enabled) == WandbTarget("alignment-sweep", None, "offline")
    (tmp_path / "netrc").write_text(f"machine wandb.here:8080\n  login user\n  password {wandb_server.KEY}\n")
    assert not logged_in(), "that is a key for another server"
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.here:8080\n")
    assert resolve_target(WandbTracking(enabled=True, entity="us")) == WandbTarget("alignment-sweep", "us", "online")
    (tmp_path / "settings").write_text("[default]\nbase_url = https://wandb.here:8080\nmode = offline\n")
    assert resolve_target(enabled).mode == "offline"
    monkeypatch.setenv("WANDB_MODE", "disabled")
    assert resolve_target(enabled) is None and resolve_target(WandbTracking()) is None


@pytest.mark.slow
def test_without_a_login_runs_are_written_offline_with_the_same_numbers(tmp_path):
    done = run(None, "-m", *SMALL, "beta=0.2,0.4", "sweep.name=demo", f"output_dir={tmp_path}")
    assert done.returncode == 0 and "W&B: offline" in done.stdout, done.stderr
    runs = {}
    for folder in (tmp_path / "wandb").glob("offline-run-*"):
        rows, offline_run = offline_history(folder)
        assert offline_run.run_group == "demo" and offline_run.run_id not in runs
        runs[offline_run.run_id] = rows
    assert len(runs) == 6
    for point in SweepFolder(tmp_path / "sweeps" / "demo").read()["points"]:
        assert training_rows(runs[point["identity"]]) == metrics_of(tmp_path, "align", point["stages"]["align"])


@pytest.mark.slow
@pytest.mark.parametrize("reason", ["no folder", "no key"])
def test_a_client_that_cannot_start_never_stops_a_run(reason, tmp_path):
    if reason == "no folder":
        (tmp_path / "wandb").write_text("a file where the client wants its folder")
    options = ["tracking.wandb.mode=online"] if reason == "no key" else []
    done = run(None, *SMALL, f"output_dir={tmp_path}", *options)
    assert "result:" in done.stdout and done.stderr.count("warning: upload incomplete") == 1
