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


def fifo(path):
    os.mkfifo(path)


BROKEN_FILES = {
    "not UTF-8": lambda path: path.write_bytes(b"machine api.wandb.ai password \xff\xfe"),
    "no words of its format": lambda path: path.write_text("[[machine\n=\n"),
    "NUL": lambda path: path.write_bytes(b"\x00" * 100),
    "a folder": lambda path: path.mkdir(),
    "a pipe": fifo,
    "a loop": lambda path: path.symlink_to(path),
    "huge": lambda path: path.write_text("machine api.wandb.ai login user password secret\n" * 50_000),
}


@pytest.mark.parametrize("break_file", BROKEN_FILES.values(), ids=BROKEN_FILES)
@pytest.mark.parametrize("name", ["netrc", "settings"])
def test_a_broken_file_of_the_client_is_no_login(name, break_file, tmp_path, monkeypatch):
    for variable in [variable for variable in os.environ if variable.startswith("WANDB_")]:
        monkeypatch.delenv(variable)
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    monkeypatch.setenv("WANDB_CONFIG_DIR", str(tmp_path))
    (tmp_path / "netrc").write_text(f"machine api.wandb.ai login user password {wandb_server.KEY}\n")
    assert logged_in(), "the control: these files are read"
    (tmp_path / name).unlink(missing_ok=True)
    break_file(tmp_path / name)
    assert logged_in() == (name == "settings")
    assert resolve_target(WandbTracking(enabled=True)).mode == ("online" if name == "settings" else "offline")


def test_without_a_home_nobody_is_logged_in(monkeypatch):
    for variable in ("NETRC", "HOME", "WANDB_API_KEY", "WANDB_CONFIG_DIR"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setattr("pathlib.Path.expanduser", lambda path: (_ for _ in ()).throw(RuntimeError("no home")))
    assert not logged_in()


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
