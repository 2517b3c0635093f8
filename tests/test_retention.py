"""Models while a sweep runs: few on disk, and whatever is killed or shared, none that is needed later."""

import os
import random
import shutil
from contextlib import suppress
from itertools import product
from pathlib import Path

import pytest
import yaml

from src.store import retention
from src.store.files import with_checksum, write_json
from src.store.integrity import DONE, WEIGHTS_REMOVED, describe_files
from src.store.lease import Lease
from src.store.retention import release_models
from src.store.store import RESULT_FILES, STAGE_FILE, StageName, Store
from tests.support.fake_sweep import METHODS, FakeSweep

NUM_WORKERS = 3


class Killed(BaseException):
    pass


def kill_removals(rng, patch):
    """Kill some removals of a model, before the model is marked as removed or between that and the deletion."""
    remove = Store.remove_weights

    def maybe_killed(store, stage, unless=lambda: False):
        moment = rng.choice(["never", "never", "before", "between"])
        if moment == "never":
            remove(store, stage, unless)
            return
        if moment == "between":
            write_json(store.dir(stage) / WEIGHTS_REMOVED, {"removed": "now"})
        raise Killed

    patch.setattr(Store, "remove_weights", maybe_killed)


def play(sweep, rng, *, kills=False, num_failed=0):
    """Run all points, NUM_WORKERS at a time, in a random order; the failed ones are retried after the sweep's end.

    Returns the number of models on disk after every result, and what is selected in the end.
    """
    order = rng.sample(sweep.points, len(sweep.points))
    sizes, selected = [], None
    for todo in (order[num_failed:], order[:num_failed]):
        running = []
        while todo or running:
            while todo and len(running) < NUM_WORKERS:
                running.append(todo.pop())
                sweep.align(running[-1])
            point = running.pop(rng.randrange(len(running)))
            sweep.evaluate(point)
            sizes.append(len(sweep.models()))
            if not kills or rng.random() < 0.7:  # else it was killed when it had published the result
                with suppress(Killed):
                    release_models(sweep.folder, {point["identity"]})
        selected = None
        while selected is None:  # the same command again
            with suppress(Killed):
                selected = sweep.finalize()
    return sizes, selected


CASES = list(product(("best", "lowest_kl_in_shortlist"), (1, 2), range(2)))


def lost_models(tmp_path, monkeypatch):
    """Yield the selected models that are not on disk at the end of sweeps whose processes were killed and failed."""
    for number, (rule, seeds, seed) in enumerate(CASES):
        rng = random.Random(seed)
        sweep = FakeSweep(tmp_path / str(number), rng, rule=rule, seeds=seeds)
        with monkeypatch.context() as patch:
            kill_removals(rng, patch)
            _, selected = play(sweep, rng, kills=True, num_failed=rng.choice([0, 3]))
        yield from selected - sweep.models()


def test_no_kill_loses_a_model_that_is_selected_later(tmp_path, monkeypatch):
    assert list(lost_models(tmp_path, monkeypatch)) == []


def test_the_best_of_what_is_there_alone_would_lose_some(tmp_path, monkeypatch):
    """The negative control."""

    def best_so_far(points, rule):
        done = [point for point in points if point.quality is not None]
        return {max((p for p in done if p.study == s), key=lambda p: p.quality).result for s in {p.study for p in done}}

    monkeypatch.setattr(retention, "selectable", best_so_far)
    assert any(lost_models(tmp_path, monkeypatch))


@pytest.mark.parametrize("seed", range(4))
def test_on_disk_is_at_most_a_model_for_each_method_and_running_point(seed, tmp_path):
    rng = random.Random(seed)
    sweep = FakeSweep(tmp_path, rng, betas=(0.1, 0.5, 1.0, 3.0))
    sizes, selected = play(sweep, rng, num_failed=seed % 2)
    assert max(sizes) <= len(METHODS) + NUM_WORKERS < len(sweep.points)
    assert sweep.models() == selected and len(selected) == len(METHODS)


def test_the_selected_model_of_every_variant_stays_though_best_yaml_names_one(tmp_path):
    rng = random.Random(0)
    sweep = FakeSweep(tmp_path, rng, betas=(0.1, 1.0), variants=("", " n=2"))
    _, selected = play(sweep, rng)
    named = yaml.safe_load(sweep.folder.best_yaml.read_text())["s"]
    assert sweep.models() == selected and len(selected) == 2 * len(named) == 2 * len(METHODS)
    sweep.folder.write(sweep.record | {"state": "done"})
    other = FakeSweep(tmp_path, rng, name="other", betas=(0.1, 1.0))  # whose points are among those of this one
    release_models(other.folder, {point["identity"] for point in other.points})
    assert selected == sweep.models(), "nor does another sweep of the store remove them"


@pytest.mark.parametrize("name", [None, *RESULT_FILES])
def test_while_a_file_of_the_best_result_is_damaged_the_model_of_the_next_one_stays(name, tmp_path):
    """The best one is to be computed again, and may then be another."""
    sweep = FakeSweep(tmp_path, random.Random(1), betas=(0.1, 1.0))
    for point in sweep.points:
        sweep.align(point)
        sweep.evaluate(point)
    best = sweep.best().iloc[0]
    (identity,) = best.identities
    folder = sweep.store.dir(StageName("evaluate", identity))
    for other in set(RESULT_FILES) - {path.name for path in folder.iterdir()}:
        (folder / other).write_text("of a judge")
    (folder / DONE).unlink()
    write_json(folder / DONE, with_checksum({"identity": identity, "files": describe_files(folder)}))
    if name is not None:
        (folder / name).write_text("damaged")
    release_models(sweep.folder, {point["identity"] for point in sweep.points})
    others = {point["identity"] for point in sweep.points if point["method"] == best.method} - {identity}
    assert len(others & sweep.models()) == (name is not None), "without damage the best one alone stays"


@pytest.mark.parametrize("keep", ["none", "best"])
def test_models_that_wait_for_a_sampling_job_stay_whatever_other_points_give(keep, tmp_path):
    rng = random.Random(2)
    sweep = FakeSweep(tmp_path, rng, keep=keep, betas=(0.1, 0.5, 1.0, 3.0))
    for point in sweep.points:  # all jobs that align have ended before the first one that samples
        sweep.align(point)
    waiting = {point["identity"] for point in sweep.points}
    for point in rng.sample(sweep.points, len(sweep.points)):
        sweep.evaluate(point)
        waiting.remove(point["identity"])
        release_models(sweep.folder, {point["identity"]})
        assert waiting <= sweep.models()
    assert len(sweep.models()) == (len(METHODS) if keep == "best" else 0), "the control: the others went"


def two_sweeps(tmp_path, **other):
    """Return a sweep whose points are done and not released yet, and another one of the same points."""
    rng = random.Random(1)
    sweep = FakeSweep(tmp_path, rng, betas=(0.1, 1.0))
    for point in sweep.points:
        sweep.align(point)
        sweep.evaluate(point)
    return sweep, FakeSweep(tmp_path, rng, name="other", betas=(0.1, 1.0), **other)


def test_models_of_a_sweep_that_keeps_all_stay(tmp_path):
    sweep, other = two_sweeps(tmp_path, keep="all")
    sweep.finalize()
    assert len(sweep.models()) == len(sweep.points)
    other.folder.record.unlink()  # the control
    assert len(sweep.finalize()) == len(sweep.models()) == len(METHODS)


@pytest.mark.parametrize("keep", ["none", "best"])
def test_a_model_stays_while_a_point_of_another_sweep_waits_for_it(keep, tmp_path):
    sweep, other = two_sweeps(tmp_path, keep=keep)
    selected = sweep.finalize()
    loser = next(point for point in sweep.points if point["identity"] not in selected)
    assert loser["identity"] not in sweep.models(), "the control: nobody waits"
    sweep.align(loser)
    shared = {**other.points[0], "identity": "later", "stages": {**loser["stages"], "evaluate": "later"}}
    other.folder.write(other.record | {"points": [shared]})
    sweep.finalize()
    assert sweep.models() == selected | {loser["identity"]}
    other.evaluate(shared)
    release_models(other.folder, {"later"})
    assert (loser["identity"] in sweep.models()) == (keep == "best"), "it may be the other sweep's best"


@pytest.mark.parametrize("kind", ["generate", "capability"])
def test_a_model_that_a_stage_reads_stays(kind, tmp_path):
    sweep, _ = two_sweeps(tmp_path, keep="none")
    loser = next(point for point in sweep.points if point["identity"] not in sweep.selected())
    work = sweep.store.work(StageName(kind, "reader"))
    with Lease(work):
        (work / "attempt-x").mkdir()
        write_json(work / "attempt-x" / STAGE_FILE, {"upstream": {"checkpoint": loser["stages"]["align"]}})
        sweep.finalize()
        assert loser["identity"] in sweep.models() and len(sweep.models()) == len(METHODS) + 1
    sweep.finalize()
    assert loser["identity"] not in sweep.models(), "the control: it has been read"


@pytest.mark.parametrize("was_marked", [False, True], ids=["first", "after a removal that was killed"])
def test_a_reader_is_asked_for_by_every_removal(was_marked, tmp_path):
    sweep, _ = two_sweeps(tmp_path)
    align = StageName("align", sweep.points[0]["stages"]["align"])
    mark, model = (sweep.store.dir(align) / name for name in (WEIGHTS_REMOVED, "model.safetensors"))
    if was_marked:
        write_json(mark, {"removed": "now"})
    sweep.store.remove_weights(align, unless=lambda: True)
    assert model.exists() and mark.exists() == was_marked, "a reader that came after the mark computes it again"
    sweep.store.remove_weights(align, unless=lambda: False)
    assert not model.exists() and mark.exists()


def test_stages_that_end_while_readers_are_looked_for_are_no_error(tmp_path, monkeypatch):
    sweep, _ = two_sweeps(tmp_path, keep="none")
    readers = [sweep.store.work(StageName("generate", f"reader-{number}")) for number in range(3)]
    for reader in readers:
        (reader / "attempt-x").mkdir(parents=True)
        write_json(reader / "attempt-x" / STAGE_FILE, {"upstream": {"checkpoint": "another model"}})
    list_folder, num_calls = os.scandir, 0

    class Entries(list):
        __enter__, __exit__ = list.__iter__, lambda *_: None

    def scandir(path):
        nonlocal num_calls
        with list_folder(path) as listing:
            entries = Entries(listing)
        if not isinstance(path, int) and Path(path) == readers[0].parent:  # a number: of an open folder
            num_calls += 1
            for reader in readers:  # once they have been listed
                shutil.rmtree(reader, ignore_errors=True)
        return entries

    monkeypatch.setattr(os, "scandir", scandir)
    selected = sweep.finalize()
    assert num_calls and sweep.models() == selected


def test_a_model_that_is_being_computed_again_is_left_alone(tmp_path):
    sweep, _ = two_sweeps(tmp_path, keep="none")
    loser = next(point for point in sweep.points if point["identity"] not in sweep.selected())
    with Lease(sweep.store.work(StageName("align", loser["stages"]["align"]))):
        sweep.finalize()
        assert loser["identity"] in sweep.models()
    sweep.finalize()
    assert loser["identity"] not in sweep.models()


def test_a_damaged_record_of_another_sweep_keeps_every_model(tmp_path, capfd):
    sweep, other = two_sweeps(tmp_path)
    other.folder.record.write_text("{")
    sweep.finalize()
    assert len(sweep.models()) == len(sweep.points)
    assert str(other.folder.record) in capfd.readouterr().err


@pytest.mark.parametrize("content", ["{", '{"schema": 99}'], ids=["damaged", "of another version"])
def test_a_point_does_not_fail_where_the_record_of_its_sweep_cannot_be_read(content, tmp_path, capfd):
    sweep, _ = two_sweeps(tmp_path)
    sweep.folder.record.write_text(content)
    release_models(sweep.folder, {sweep.points[0]["identity"]})
    assert len(sweep.models()) == len(sweep.points)
    assert "models that are not needed any more stay for now" in capfd.readouterr().err
    sweep.folder.write(sweep.record)
    release_models(sweep.folder, {point["identity"] for point in sweep.points})
    assert len(sweep.models()) == len(METHODS), "the control"


def test_keep_none_removes_each_model_with_its_result(tmp_path):
    rng = random.Random(0)
    sweep = FakeSweep(tmp_path, rng, keep="none", betas=(0.1,))
    for point in sweep.points:
        sweep.align(point)
        release_models(sweep.folder, {point["identity"]})
        assert sweep.models() == {point["identity"]}, "it waits for its result"
        sweep.evaluate(point)
        release_models(sweep.folder, {point["identity"]})
        assert sweep.models() == set()
