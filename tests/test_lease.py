"""One holder at a time; a dead one is replaced at once where that is known, else when its heartbeat has stopped."""

import itertools
import json
import multiprocessing
import os
import signal
import threading
import time

import pytest

from src.store import lease as lease_module
from src.store.lease import Lease, LeaseLost
from tests.support.waiting import wait_until


@pytest.fixture
def short_timeouts(monkeypatch):
    monkeypatch.setattr(lease_module, "HEARTBEAT_SECONDS", 0.1)
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 1.0)


def foreign(folder, heartbeat=0, number=1):
    """Write the lease of a holder on another machine, whose process cannot be examined."""
    folder.mkdir(exist_ok=True)
    holder = {"pid": 1, "start": "1", "machine": "elsewhere/x/y", "token": "theirs", "beat": heartbeat}
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


def test_many_processes_hold_the_lease_one_after_the_other(tmp_path):
    context = multiprocessing.get_context("fork")
    inside, overlaps, order = (context.Value("i", 0) for _ in range(3))
    processes = [context.Process(target=hold_once, args=(tmp_path, inside, overlaps, order)) for _ in range(8)]
    for p in processes:
        p.start()
    for p in processes:
        p.join(60)
    assert (order.value, overlaps.value) == (8, 0)


def hold_and_die(folder):
    Lease(folder).__enter__()
    os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_holder_on_this_machine_is_replaced_at_once(tmp_path):
    process = multiprocessing.get_context("fork").Process(target=hold_and_die, args=(tmp_path,))
    process.start()
    process.join()
    with Lease(tmp_path, waiting=pytest.fail) as lease:
        assert lease.held and lease.number == 2


@pytest.mark.parametrize(("run_of_holder", "replaced_at_once"), [(0, True), (1, False), (2, False)])
def test_a_job_requeued_on_another_node_does_not_wait_for_its_former_run(
    tmp_path, short_timeouts, monkeypatch, run_of_holder, replaced_at_once
):
    foreign(tmp_path)
    path = tmp_path / "lease-000001"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"job": "7", "run": run_of_holder}))
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    waited = []
    with Lease(tmp_path, waiting=waited.append) as lease:
        assert lease.held
    # A process of the same run, on another node of the job, is waited for.
    assert (not waited) == replaced_at_once


def test_a_holder_on_another_machine_is_replaced_only_after_its_heartbeat_has_stopped(tmp_path, short_timeouts):
    foreign(tmp_path)
    started = time.monotonic()
    with Lease(tmp_path) as lease:
        assert lease.held
    assert time.monotonic() - started > 1.0


def test_a_holder_on_another_machine_keeps_the_lease_while_its_heartbeat_goes_on(tmp_path, short_timeouts):
    beats = itertools.count(1)

    def beat_while_waiting(holder):
        foreign(tmp_path, beat := next(beats))
        return beat == 5  # it gives up after 2 s, twice as long as a heartbeat may be missing

    foreign(tmp_path)
    with Lease(tmp_path, waiting=beat_while_waiting) as lease:
        assert not lease.held


def test_a_holder_whose_lease_was_taken_over_notices_before_it_publishes(tmp_path, short_timeouts):
    with Lease(tmp_path) as lease:
        lease.check()
        foreign(tmp_path, number=2)
        wait_until(lambda: lease._lost, 60, "a heartbeat that finds another holder")
        with pytest.raises(LeaseLost):
            lease.check()


HERE = {"machine": lease_module._machine()}  # where holders are looked up by their process id
GARBAGE = [
    "",
    "[]",
    "5",
    "{",
    "\x00",
    *map(json.dumps, (HERE, HERE | {"pid": "x"}, {"pid": 1, "job": "7", "run": "x"})),
]


@pytest.mark.parametrize("content", [*GARBAGE, "a folder", "a link to nowhere"])
def test_a_lease_that_cannot_be_read_is_replaced_once_it_is_stale(content, tmp_path, short_timeouts, monkeypatch):
    monkeypatch.setattr(lease_module, "STALE_SECONDS", 0.2)
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    path = tmp_path / "lease-000007"
    if content == "a folder":
        path.mkdir()
    elif content == "a link to nowhere":
        path.symlink_to("nowhere")
    else:
        path.write_text(content)
    with Lease(tmp_path) as lease:
        assert lease.held and lease.number == 8
        lease.check()
    assert not os.path.lexists(path)


def test_other_files_beside_a_lease_are_none(tmp_path):
    for name in ("lease-abcdef", "lease-1", "lease-0000001", "lease-", "lease-\u0663\u0663\u0663\u0663\u0663\u0663"):
        (tmp_path / name).write_text("")
    with Lease(tmp_path) as lease:
        assert lease.number == 1


def test_numbers_of_leases_may_outgrow_their_width(tmp_path, short_timeouts):
    foreign(tmp_path, number=999_999)
    for expected in (1_000_000, 1_000_001):
        with Lease(tmp_path) as lease:
            assert lease.number == expected
            lease.check()


@pytest.mark.parametrize(("count", "run"), [("abc", 0), ("", 0), ("-1", 0), ("\u0663", 0), ("2", 2)])
def test_a_restart_count_that_is_no_number_is_none(count, run, monkeypatch):
    monkeypatch.setenv("SLURM_RESTART_COUNT", count)
    assert lease_module._slurm_run()[1] == run


def test_exactly_one_of_several_takers_wins(tmp_path):
    takers = [Lease(tmp_path) for _ in range(20)]
    start = threading.Barrier(20)
    outcomes = []

    def take(lease):
        start.wait()
        outcomes.append(lease._create(1))

    threads = [threading.Thread(target=take, args=(t,)) for t in takers]
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert sum(outcomes) == 1
