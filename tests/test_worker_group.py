"""Processes that compute a stage together: whose word counts when they end it differently. Simulated."""

import os
from types import SimpleNamespace

import pytest

from launchers import worker_group
from launchers.worker import Outcome, Stop, Work, WorkerSlot
from launchers.worker_group import GroupSlot, WorkerGroup
from launchers.worker_pool import group_slots

DONE, STOPPED = Outcome("done"), Outcome("stopped", "the time limit is near")
FAILED, DIED = Outcome("failed", "process 2: out of memory"), Outcome("died", "worker process died (SIGKILL)")
STAGE = SimpleNamespace(label="a stage")


class SimulatedWorker:
    """A worker whose process ends when the test says so."""

    def __init__(self, slot):
        self.slot, self.outcome, self.messages, self.coming = slot, None, [], None
        self.death, end = os.pipe()  # readable once the process is dead
        self.process = SimpleNamespace(sentinel=self.death, kill=lambda: None, is_alive=lambda: self.coming != DIED)
        self.die = lambda: os.write(end, b"x")
        self.handles = [self.death]

    def send(self, message):
        self.messages.append(message)
        if isinstance(message, Work):
            self.outcome = None

    def receive(self):
        self.outcome = self.coming

    def end(self):
        self.messages.append("end")

    def join(self, timeout):
        pass


@pytest.fixture
def group(monkeypatch, tmp_path):
    monkeypatch.setattr(worker_group, "Worker", SimulatedWorker)
    monkeypatch.setattr(worker_group, "_DEATH_SECONDS", 0.01)
    group = WorkerGroup(GroupSlot(3, WorkerSlot(6, "0,1,2", tmp_path)))
    group.submit(STAGE, tmp_path / "a.log")
    return group


def end(group, *coming):
    """End the stage in some of the processes (rank -> outcome), and return what the group says."""
    for rank, outcome in coming:
        group.workers[rank].coming = outcome
        if outcome == DIED:
            group.workers[rank].die()
    return group.collect([handle for rank, _ in coming for handle in group.workers[rank].handles])


def test_a_stage_is_done_when_every_process_says_so(group):
    assert end(group, (1, DONE), (2, DONE)) is None and group.stage is STAGE
    assert end(group, (0, DONE)) == DONE and group.stage is None
    assert group.is_usable(DONE)


def test_the_first_process_alone_says_that_a_stage_has_stopped(group):
    assert end(group, (1, STOPPED)) is None, "its checkpoint may not be published yet"
    assert end(group, (0, STOPPED)) == STOPPED
    assert not group.is_usable(STOPPED), "the third still waits for the others"


def test_a_failure_of_any_process_is_that_of_the_stage(group):
    assert end(group, (2, FAILED)) == FAILED and not group.is_usable(FAILED)


def test_a_death_explains_the_failures_that_follow_from_it(group):
    group.workers[1].coming = DIED
    group.workers[1].die()
    assert end(group, (0, Outcome("failed", "Connection closed by peer"))) == DIED
    # The control: without a death the exception stands.
    group.workers[1].coming = None
    os.read(group.workers[1].death, 1)
    group.submit(STAGE, group.workers[0].messages[0].log_file)
    assert end(group, (0, FAILED)) == FAILED


def test_every_process_gets_the_stage_a_log_of_its_own_and_the_request_to_stop(group, tmp_path):
    group.request_stop("why")
    logs = [worker.messages[0].log_file.name for worker in group.workers]
    assert logs == ["a.log", "a.rank1.log", "a.rank2.log"]
    assert [worker.messages[1] for worker in group.workers] == [Stop("why")] * 3
    slots = [worker.slot for worker in group.workers]
    assert [slot.rank for slot in slots] == [0, 1, 2] and {slot.size for slot in slots} == {3}
    assert len({slot.port for slot in slots}) == 1 and slots[0].port > 0
    before = list(group.workers)
    group.restart()
    assert all("end" in worker.messages for worker in before) and not set(before) & set(group.workers)


@pytest.mark.parametrize(
    ("workers", "size", "gpus", "most", "devices", "num_processes"),
    [
        (None, 1, ["0", "1", "2"], 9, ["0", "1", "2"], 3),
        (None, 2, ["0", "1", "2", "3", "4"], 9, ["0,1", "2,3"], 4),  # no group gets half of what it needs
        (None, 8, [str(i) for i in range(8)], 9, ["0,1,2,3,4,5,6,7"], 8),
        (None, 1, ["0", "1", "2"], 2, ["0", "1"], 2),
        (3, 1, ["0", "1"], 9, ["0", "1", "0"], 3),
        (None, 1, [], 9, [None] * 4, 4),
        (None, 2, [], 9, [None] * 2, 4),
        (None, 8, [], 9, [None], 8),
    ],
)
def test_gpus_and_cores_are_divided_among_groups(
    workers, size, gpus, most, devices, num_processes, monkeypatch, tmp_path
):
    monkeypatch.setattr("launchers.worker_pool.cores", lambda: 4)
    slots = group_slots(workers, size, gpus, most, lambda number, gpus: WorkerSlot(number, gpus, tmp_path))
    assert [slot.worker.gpus for slot in slots] == devices
    assert {slot.worker.num_processes for slot in slots} == {num_processes} and {slot.size for slot in slots} == {size}
