"""Two sweeps of one name: the second is refused while the first runs with other points, and nothing is lost."""

import itertools
import json
import os
import signal
import threading

import pytest
import yaml

from benchmarks.aggregation import make_sweep
from src.errors import ConfigError
from src.store import lease
from src.store.files import read_json
from src.store.lease import Lease
from src.store.sweep_folder import SweepFolder
from sweeps.search.running import RunningSweep
from tests.support.commands import SMALL, start, train
from tests.support.kills import stopping_at, wait_until_stopped


@pytest.fixture
def folder(tmp_path):
    return SweepFolder(tmp_path / "sweeps" / "s")


def test_other_points_are_refused_while_a_process_runs_a_sweep_of_the_name(folder):
    with RunningSweep(folder) as first, RunningSweep(folder) as same, RunningSweep(folder) as other:
        first.claim({"a", "b"})
        first.claim({"a", "b"})  # of its next rung
        same.claim({"b", "a"})
        with pytest.raises(ConfigError) as raised:
            other.claim({"a", "b", "c"})
        message = str(raised.value)
        assert message.startswith("sweep.name=s: ") and f"process {os.getpid()} on " in message and "\n" not in message
    with RunningSweep(folder) as other:
        other.claim({"c"})


def test_a_killed_process_does_not_block_its_folder(folder):
    entry = folder.path / ".running" / "other-1"
    with Lease(entry) as held:
        text = (entry / "lease-000001").read_text()
        with RunningSweep(folder) as running, pytest.raises(ConfigError):
            running.claim({"a"})
        killed = json.loads(text) | {"start": "0"}  # the process id belongs to a later process by now
    (entry / "lease-000001").write_text(json.dumps(killed))
    assert held.number == 1
    with RunningSweep(folder) as running:
        running.claim({"a"})
    assert not entry.exists()


def test_a_process_of_another_machine_is_watched_until_its_heartbeat_changes_or_is_stale(folder, monkeypatch):
    entry = folder.path / ".running" / "other-1"
    entry.mkdir(parents=True)
    file, holder = entry / "lease-000001", {"pid": 1, "start": "1", "machine": "far/b/c", "run": 0}
    file.write_text(json.dumps(holder | {"beat": 1}))

    refused = threading.Event()

    def send_heartbeats():
        for beat in itertools.count(2):
            lease.atomic_write(file, json.dumps(holder | {"beat": beat}))
            if refused.wait(0.1):
                break

    thread = threading.Thread(target=send_heartbeats)
    thread.start()
    with RunningSweep(folder) as running, pytest.raises(ConfigError, match="process 1 on far runs a sweep"):
        running.claim({"a"})
    refused.set()
    thread.join()
    monkeypatch.setattr(lease, "STALE_SECONDS", 1.5)
    with RunningSweep(folder) as running:
        running.claim({"a"})  # no heartbeat since


@pytest.mark.slow
def test_the_sweep_that_runs_ends_as_if_the_other_had_not_been_started(tmp_path):
    arguments = ["-m", "beta=0.1,1", *SMALL, "trainer.align.epochs=4", f"output_dir={tmp_path}", "sweep.name=s"]
    folder = SweepFolder(tmp_path / "sweeps" / "s")
    alignment = stopping_at("align/.work/*/attempt-*", once=tmp_path / "stopped")
    first = start(*arguments, "method=dpo", env=alignment)
    wait_until_stopped(first)
    record = folder.record.read_bytes()
    refused = train(*arguments, "method=ipo", check=False)
    assert refused.returncode == 2 and len(refused.stderr.strip().splitlines()) == 1, refused.stderr
    assert f"process {first.pid} on " in refused.stderr and "other points" in refused.stderr
    assert folder.record.read_bytes() == record and not folder.path.with_name("s.1").exists()
    same = start(*arguments, "method=dpo", env=stopping_at("sweeps/s/sweep.json"))
    wait_until_stopped(same)  # it is not refused; its record comes next
    for process in (first, same):
        os.killpg(process.pid, signal.SIGCONT)
    for process in (first, same):
        output = process.communicate(timeout=300)[0]
        assert process.returncode == 0 and "Traceback" not in output, output
    assert [point["state"] for point in read_json(folder.record)["points"]] == ["done"] * 2
    assert set(yaml.safe_load(folder.best_yaml.read_text())["mini_tldr"]) == {"dpo"}
    train(*arguments, "method=ipo", "beta=0.1")
    assert read_json(folder.path.with_name("s.1") / "sweep.json")["state"] == "done"


@pytest.mark.slow
def test_the_record_of_a_killed_sweep_is_archived_with_a_final_state(tmp_path):
    folder = make_sweep(tmp_path, seeds=1, lrs=1, betas=1, methods=("dpo", "ipo"))
    folder.write(folder.read() | {"state": "running", "name": "s"})
    folder.path.rename(tmp_path / "sweeps" / "s")
    done = train("-m", "beta=0.1", *SMALL, f"output_dir={tmp_path}", "sweep.name=s", check=False)
    assert done.returncode == 0 and "the old results were moved to s.1" in done.stdout, done.stderr
    archived = read_json(tmp_path / "sweeps" / "s.1" / "sweep.json")
    assert archived["state"] == "done" and archived["finished"]
    assert [point["state"] for point in archived["points"]] == ["done"] * 2
