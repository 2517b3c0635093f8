"""One holder at a time; the dead are replaced at once where that can be seen, else when they stand still."""

import json
import multiprocessing
import threading
import time

import pytest

from src.store import lease as lease_module
from src.store.lease import Lease, LeaseLost


@pytest.fixture
def impatient(monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 1.0)


def foreign(folder, beat=0, number=1):
    """A holder on another machine, whose process cannot be looked at."""
    folder.mkdir(exist_ok=True)
    holder = {"pid": 1, "start": "1", "machine": "elsewhere/x/y", "token": "theirs", "beat": beat}
    (folder / f"lease-{number:06d}").write_text(json.dumps(holder))


def hold_once(folder, inside, overlaps, order):
    with Lease(folder):
        with inside.get_lock():
            inside.value += 1
            if inside.value > 1:
                overlaps.value += 1
        time.sleep(0.02)
        with order.get_lock():
            order.value += 1
        with inside.get_lock():
            inside.value -= 1


def test_many_processes_hold_it_one_after_the_other(tmp_path):
    context = multiprocessing.get_context("fork")
    inside, overlaps, order = (context.Value("i", 0) for _ in range(3))
    processes = [context.Process(target=hold_once, args=(tmp_path, inside, overlaps, order)) for _ in range(8)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert (order.value, overlaps.value) == (8, 0)


def _hold_and_die(folder):
    Lease(folder).__enter__()
    import os
    import signal

    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_holder_on_this_machine_is_replaced_at_once(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=_hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    begun = time.monotonic()
    with Lease(tmp_path) as lease:
        assert lease.held and lease.number == 2
    assert time.monotonic() - begun < 2


@pytest.mark.parametrize(("holders_run", "at_once"), [(0, True), (1, False), (2, False)])
def test_a_job_queued_again_on_another_node_does_not_wait_for_its_own_former_run(
    tmp_path, impatient, monkeypatch, holders_run, at_once
):
    foreign(tmp_path)
    path = tmp_path / "lease-000001"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job": "7", "run": holders_run}))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    begun = time.monotonic()
    with Lease(tmp_path) as lease:
        assert lease.held
    # A process of the same run (another node of the job, say) is somebody else.
    assert (time.monotonic() - begun < 0.5) == at_once


def test_a_holder_elsewhere_is_replaced_only_after_its_heartbeat_stood_still(tmp_path, impatient):
    foreign(tmp_path)
    begun = time.monotonic()
    with Lease(tmp_path) as lease:
        assert lease.held
    assert time.monotonic() - begun > 1.0


def test_a_beating_holder_elsewhere_is_left_alone(tmp_path, impatient):
    stop = threading.Event()

    def beat():
        count = 0
        while not stop.wait(0.2):
            count += 1
            foreign(tmp_path, count)

    foreign(tmp_path)
    thread = threading.Thread(target=beat)
    thread.start()
    begun = time.monotonic()
    with Lease(tmp_path, waiting=lambda holder: time.monotonic() - begun > 3) as lease:
        assert not lease.held  # gave up waiting; it was never free
    stop.set()
    thread.join()


def test_an_overtaken_holder_finds_out_before_it_publishes(tmp_path, impatient):
    with Lease(tmp_path) as lease:
        lease.check()
        foreign(tmp_path, number=2)
        time.sleep(0.5)
        with pytest.raises(LeaseLost):
            lease.check()


def test_one_of_several_takers_wins(tmp_path):
    takers = [Lease(tmp_path) for _ in range(20)]
    start = threading.Barrier(20)
    won = []

    def take(lease):
        start.wait()
        won.append(lease._create(1))

    threads = [threading.Thread(target=take, args=(t,)) for t in takers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sum(won) == 1
