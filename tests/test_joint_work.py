"""Ranks that compute shares of one piece of work: every batch once, no row twice, an error of one is that of all."""

import contextlib
import errno
import json
import os
import time
from functools import partial
from types import SimpleNamespace

import pytest

from src import distributed
from src.distributed import DistributedContext, JointWork, Share, get_distributed
from src.errors import ConfigError, StageError
from src.planning.plan import make_plan
from src.preemption import Interrupted
from src.serving import model_server
from src.stages import runner
from src.stages.shared_rows import SharedRows
from src.store.attempt import Attempt
from src.store.part_files import PartFiles
from src.store.store import Store
from tests.support.configs import point
from tests.support.ranks import on_ranks
from tests.support.waiting import wait_until

BATCHES = [[9, 4], [1, 8], [3], [0, 7, 2], [5, 6]]
SECONDS = 20  # by which everything here has ended; the time-outs of collectives are half an hour and days


@pytest.mark.parametrize("done", [(), {9, 4, 5}, range(10)])
@pytest.mark.parametrize("size", [1, 2, 3, 8])
def test_shares_are_all_batches_that_are_not_done_each_once_and_whole(size, done):
    shares = [Share(rank, size, done).of(BATCHES) for rank in range(size)]
    remaining = [batch for batch in BATCHES if not set(batch) <= set(done)]
    assert sorted(batch for share in shares for batch in share) == sorted(remaining)
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


def attempt_in(folder):
    folder.mkdir(exist_ok=True)
    return Attempt(folder, folder, None, lambda *_: None, "label", "identity", folder)


def square(folder, num_batches=None):
    """Compute the squares of all items, or stop after some batches; return all rows, and the items computed here."""
    reported, computed = [], []
    rows = SharedRows(attempt_in(folder), "squares", reported.append)
    for batch in rows.share.of(BATCHES)[:num_batches]:
        computed += batch
        rows.save({i: {"square": i * i} for i in batch})
    if num_batches is not None:
        return {}, computed
    squares = {i: row["square"] for i, row in rows.gather().items()}
    assert reported[-1] == 10 and reported == sorted(reported)
    return squares, computed


@pytest.mark.parametrize("sizes", [(1, 1), (2, 2), (2, 3), (3, 1), (1, 2)])
def test_what_any_rank_had_done_is_done_for_any_number_of_ranks(sizes, tmp_path):
    before = [i for _, computed in on_ranks(sizes[0], "ddp", square, tmp_path, 1) for i in computed]
    parts = sorted(path.name for path in tmp_path.iterdir())
    assert parts == sorted(["squares.jsonl", "squares-1.jsonl", "squares-2.jsonl"][: sizes[0]])
    results = on_ranks(sizes[1], "ddp", square, tmp_path)
    assert [squares for squares, _ in results] == [{i: i * i for i in range(10)}] * sizes[1]
    after = [i for _, computed in results for i in computed]
    assert sorted(before + after) == list(range(10)) and before and after


def test_a_part_that_was_cut_off_or_is_no_file_costs_its_own_rows_alone(tmp_path, caplog):
    files = PartFiles(tmp_path, "rows")
    files.append(0, [{"index": 0, "value": 0.1}])
    files.append(1, [{"index": 1, "value": 0.2}, {"index": 2, "value": 0.3}])
    files.append(3, [{"index": 0, "value": 0.1}, {"index": 3, "value": 0.4}])
    os.mkfifo(files.path(2))
    content = files.path(1).read_bytes()
    files.path(1).write_bytes(content[:-9])  # as a kill in the middle of a write leaves it
    edited = json.loads(files.path(3).read_bytes().splitlines()[1]) | {"value": 0.5}
    with files.path(3).open("a") as handle:
        handle.write(json.dumps(edited | {"index": 4}))
    (tmp_path / "rows-other.jsonl").write_text("of another name")
    rows = files.collect()
    assert {index: row["value"] for index, row in rows.items()} == {0: 0.1, 1: 0.2, 3: 0.4}
    assert caplog.text.count("1 damaged lines") == 2
    assert {path.name for path in tmp_path.iterdir()} == {"rows.jsonl", "rows-other.jsonl"}
    assert files.collect() == rows


def error_of(function, scope=None):
    """Return what the function raises on this rank, and after how many seconds; scope: by default all fail together."""
    started = time.monotonic()
    try:
        with scope or get_distributed().failing_together():
            function()
    except Exception as error:
        return type(error), str(error), time.monotonic() - started
    return None


def fail_while_others_compute():
    ranks = get_distributed()
    work = JointWork(ranks)
    if ranks.rank == 1:
        raise ConfigError("dataset: row 7 is broken")
    for _ in range(10 * SECONDS):
        time.sleep(0.1)
        work.advance(1)


def fail_while_others_wait():
    ranks = get_distributed()
    work = JointWork(ranks)
    if ranks.rank == 1:
        time.sleep(0.3)
        raise ConfigError("dataset: row 7 is broken")
    work.wait(lambda num_done: None)


def fail_while_one_reads_the_error_late():
    ranks = get_distributed()
    if ranks.rank == 1:
        raise ConfigError("dataset: row 7 is broken")
    # Rank 0, which serves the store, reads the error at once, rank 2 a second later.
    time.sleep(ranks.rank * 0.5)
    JointWork(ranks).wait(lambda num_done: None)


class NotPickled(Exception):
    def __init__(self, one, two):
        super().__init__(f"{one} and {two}")


def fail_in_a_way_that_cannot_be_sent():
    if get_distributed().rank == 1:
        raise NotPickled("one", "two")
    JointWork(get_distributed()).wait(lambda num_done: None)


@pytest.mark.parametrize(
    "function", [fail_while_others_compute, fail_while_others_wait, fail_while_one_reads_the_error_late]
)
def test_an_error_of_one_rank_is_raised_by_all_within_seconds(function, monkeypatch):
    monkeypatch.setattr(distributed, "ERROR_SECONDS", 60)  # a busy machine may let a rank read the error late
    errors = on_ranks(3, "ddp", error_of, function)
    assert [error[:2] for error in errors] == [(ConfigError, "dataset: row 7 is broken")] * 3
    assert max(seconds for *_, seconds in errors) < SECONDS


def computed_with_an_unwritable_part(output_dir):
    store = Store(output_dir)
    plan = make_plan([point(f"output_dir={output_dir}")], store)
    (sft,) = (stage for stage in plan.stages.values() if stage.role == "sft")

    def run(stage, store, attempt):
        if get_distributed().rank == 1:
            raise PermissionError(errno.EACCES, "Permission denied", "part 1")
        JointWork(get_distributed()).wait(lambda num_done: None)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(runner, "_run", run)
        try:
            runner.compute_or_wait(sft, store)
        except Exception as error:
            return type(error), str(error)


def test_an_error_of_the_file_system_on_any_rank_says_on_all_of_them_what_to_do(tmp_path):
    told = StageError, "part 1: Permission denied; mend that and run the same command again"
    assert on_ranks(2, "ddp", computed_with_an_unwritable_part, tmp_path) == [told, told]


def test_an_error_that_cannot_be_sent_names_its_process_elsewhere():
    (kind, message, _), own, _ = on_ranks(3, "ddp", error_of, fail_in_a_way_that_cannot_be_sent)
    assert (kind, message) == (StageError, "process 1: NotPickled: one and two") and own[0] is NotPickled


def fail_while_others_are_in_a_collective(failing_rank, together):
    ranks = get_distributed()
    scope = ranks.failing_together() if together else contextlib.nullcontext()
    # The process of the one that fails ends when this returns.
    return error_of([].pop if ranks.rank == failing_rank else ranks.barrier, scope)


def test_a_rank_in_a_collective_hears_of_the_error_of_a_rank_that_has_ended():
    first, own = on_ranks(2, "ddp", fail_while_others_are_in_a_collective, 1, True)
    assert own[0] is IndexError and first[:2] == own[:2] and first[2] < SECONDS
    # The control: the collective itself says only that a connection was closed.
    first, _ = on_ranks(2, "ddp", fail_while_others_are_in_a_collective, 1, False)
    assert first[0] is RuntimeError


def test_ranks_say_so_when_rank_0_has_ended_and_an_error_of_their_own_stays(monkeypatch):
    own, other = on_ranks(2, "ddp", fail_while_others_are_in_a_collective, 0, True)
    assert own[0] is IndexError and other[0] in (IndexError, StageError)
    assert other[1] == own[1] or "process 0 of the run has ended" in other[1]
    ranks = DistributedContext(rank=1, size=2)
    monkeypatch.setattr(DistributedContext, "store", property(lambda _: 1 / 0))
    for error in (Interrupted("stopped", "near the time limit"), ConfigError("a wrong row")):
        assert error_of(partial(_raise, error), ranks.failing_together())[:2] == (type(error), str(error))
    lost = error_of(partial(_raise, RuntimeError("Connection closed by peer")), ranks.failing_together())
    assert lost[0] is StageError and "process 0 of the run has ended" in lost[1]


def _raise(error):
    raise error


def work_until_each_step_is_seen(folder):
    """Rank 1 goes on when rank 0 has reported how far it is. Return what this rank reported."""
    ranks, reports = get_distributed(), []
    work = JointWork(ranks, num_done=2)

    def report(num_done):
        reports.append(num_done)
        (folder / f"{ranks.rank}-{num_done}").touch()

    for _ in range(4 * ranks.rank):
        work.advance(3)
        seen = folder / f"0-{work.advance()}"
        wait_until(seen.exists, 60, "rank 0 to report it")
    work.wait(report)
    return reports


def test_a_rank_that_waits_reports_what_others_do_meanwhile(tmp_path):
    of_rank_0, of_rank_1 = on_ranks(2, "ddp", work_until_each_step_is_seen, tmp_path)
    assert {5, 8, 11, 14} <= set(of_rank_0) and of_rank_0[-1] == of_rank_1[-1] == 14


@pytest.mark.parametrize(("visible", "own"), [("4,5,6,7", "5"), ("GPU-a,GPU-b", "GPU-b"), (None, "1")])
def test_every_rank_gives_its_server_its_own_gpu_and_port(visible, own, monkeypatch):
    ranks = SimpleNamespace(size=4, rank=1, local_rank=1)
    monkeypatch.setattr(model_server, "get_distributed", lambda: ranks)
    monkeypatch.setattr(model_server, "visible_gpus", lambda: visible.split(",") if visible else ["0", "1"])
    assert model_server._own_environment()["CUDA_VISIBLE_DEVICES"] == own
    assert {model_server._free_port() % 4 for _ in range(5)} == {1}
    # The control: the server of a run of one process sees what the process does.
    ranks.size, ranks.rank = 1, 0
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "4,5")
    assert model_server._own_environment()["CUDA_VISIBLE_DEVICES"] == "4,5"
