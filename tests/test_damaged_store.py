"""Damaged artifacts are named, set aside and computed again by the same command; what nobody reads is left alone."""

import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from src import errors
from src.estimates.cost import Cost
from src.estimates.forecast import Forecast
from src.planning.plan import Plan, make_plan
from src.stages.runner import compute_or_wait
from src.store.files import with_checksum
from src.store.store import Store
from tests.support.artifacts import results
from tests.support.configs import TINY, point

OTHER = "beta=0.3"  # a point that shares SFT and reference with the first


@pytest.fixture(autouse=True)
def _warnings_anew():
    errors.warn.cache_clear()


def compute(folder: Path, *overrides: str) -> Plan:
    """Compute a point as a single run does, and return its plan as it was before."""
    from src.model.loading import set_cpu_threads

    store, tiny = Store(folder), point(*TINY, "beta=0.1", *overrides, f"output_dir={folder}")
    plan = make_plan([tiny], store)
    set_cpu_threads(tiny.engine.cpu_threads)
    for identity, stage in plan.stages.items():
        if identity in plan.needed:
            compute_or_wait(stage, store)
    return plan


@pytest.fixture(scope="module")
def one_point(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("one_point")
    compute(folder)
    return folder


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory, one_point) -> dict[str, object]:
    """Return the artifacts of both points."""
    folder = tmp_path_factory.mktemp("both") / "out"
    shutil.copytree(one_point, folder)
    compute(folder, OTHER)
    return results(folder)


@pytest.fixture
def store_of_one(one_point, tmp_path) -> Path:
    shutil.copytree(one_point, tmp_path / "out")
    return tmp_path / "out"


def flip(path: Path) -> None:
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)


def truncate(path: Path) -> None:
    os.truncate(path, path.stat().st_size // 2)


def empty(path: Path) -> None:
    os.truncate(path, 0)


def into_a_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def of_another_stage(path: Path) -> None:
    done = json.loads(path.read_text()) | {"identity": "0" * 24}
    del done["checksum"]
    path.write_text(json.dumps(with_checksum(done)))


Damage = Callable[[Path], None]
READ_BY_ANOTHER_POINT: list[tuple[str, Damage]] = [
    ("sft/*/model.safetensors", flip),
    ("sft/*/model.safetensors", truncate),
    ("sft/*/model.safetensors", Path.unlink),
    ("sft/*/stage.json", empty),
    ("sft/*/DONE", flip),
    ("sft/*/DONE", of_another_stage),
    ("reference/*/reference.safetensors", flip),
    ("reference/*/reference.safetensors", into_a_folder),
    ("reference/*/DONE", empty),
]


def name(value: object) -> str | None:
    return getattr(value, "__name__", None)


@pytest.mark.parametrize(("pattern", "damage"), READ_BY_ANOTHER_POINT, ids=name)
def test_what_another_point_reads_is_named_and_computed_again(pattern, damage, store_of_one, undisturbed, capsys):
    (path,) = (store_of_one / "store").glob(pattern)
    damage(path)
    compute(store_of_one, OTHER)
    assert results(store_of_one) == undisturbed
    (warning,) = capsys.readouterr().err.splitlines()
    assert warning.startswith(f"warning: {path}") and "is computed again" in warning
    kind, identity = path.parts[-3:-1]
    assert (store_of_one / "store" / kind / ".damaged" / identity).is_dir()


RESULTS: list[tuple[str, Damage]] = [
    ("evaluate/*/result.json", empty),
    ("evaluate/*/result.json", flip),
    ("evaluate/*/quality.json", flip),
    ("evaluate/*/stage.json", empty),
    ("evaluate/*/DONE", empty),
]


@pytest.mark.parametrize(("pattern", "damage"), RESULTS, ids=name)
def test_a_damaged_result_is_computed_again_and_nothing_else(pattern, damage, store_of_one, one_point, capsys):
    (path,) = (store_of_one / "store").glob(pattern)
    damage(path)
    plan = compute(store_of_one)
    assert {plan.stages[identity].kind for identity in plan.needed} == {"evaluate"}
    assert f"\n{path}" in plan.text(), "a dry run names it, too"
    assert results(store_of_one) == results(one_point)
    assert capsys.readouterr().err.startswith(f"warning: {path}")


@pytest.mark.parametrize("pattern", ["generate/*/samples.jsonl", "align/*/validation.jsonl"])
def test_what_a_missing_result_is_computed_from_is_checked(pattern, store_of_one, one_point, capsys):
    shutil.rmtree(next((store_of_one / "store" / "evaluate").glob("*/DONE")).parent)
    path = sorted((store_of_one / "store").glob(pattern))[0]
    flip(path)
    compute(store_of_one)
    assert results(store_of_one) == results(one_point)
    assert f"warning: {path}: damaged, its content" in capsys.readouterr().err


def test_what_nobody_reads_is_left_alone(store_of_one, capsys):
    for path in (store_of_one / "store").glob("align/*/model.safetensors"):
        flip(path)
    assert compute(store_of_one).needed == set()
    assert capsys.readouterr().err == ""


def test_removed_weights_are_no_damage(store_of_one, capsys):
    store = Store(store_of_one)
    (align,) = (stage for stage in compute(store_of_one).stages.values() if stage.kind == "align")
    store.remove_weights(align)
    assert store.damage(align) is None
    shutil.rmtree(next((store.root / "evaluate").glob("*/DONE")).parent)
    compute(store_of_one)  # reads the scores of the model, not its weights
    assert capsys.readouterr().err == "" and not store.has_weights(align)
    (store.dir(align) / "config.json").unlink()
    assert "config.json: missing" in (store.damage(align) or "")  # the control


def test_a_removed_model_is_computed_again_only_for_what_reads_it(store_of_one, one_point):
    store = Store(store_of_one)
    (align,) = (stage for stage in compute(store_of_one).stages.values() if stage.kind == "align")
    store.remove_weights(align)
    compute_or_wait(align, store)  # as a requeued job does whose point is done
    assert not store.has_weights(align)
    compute_or_wait(align, store, with_weights=True)  # as a job does that another one samples from
    assert store.has_weights(align)
    store.remove_weights(align)
    for kind in ("generate", "evaluate"):
        shutil.rmtree(store.root / kind)
    compute(store_of_one)
    assert store.has_weights(align) and results(store_of_one) == results(one_point)


def test_a_folder_without_DONE_is_moved_away_when_the_stage_is_published(store_of_one, one_point, capsys):
    (done,) = (store_of_one / "store").glob("evaluate/*/DONE")
    done.unlink()
    compute(store_of_one)
    assert results(store_of_one) == results(one_point)
    assert f"warning: {done.parent}: has no DONE" in capsys.readouterr().err


def test_an_attempt_whose_folder_was_deleted_is_not_published(store_of_one, monkeypatch):
    from src.stages import evaluate

    undisturbed_run = evaluate.run

    def run(inputs, resources, upstream, attempt):
        undisturbed_run(inputs, resources, upstream, attempt)
        (attempt.out / "stage.json").unlink()

    monkeypatch.setattr(evaluate, "run", run)
    shutil.rmtree(next((store_of_one / "store" / "evaluate").glob("*/DONE")).parent)
    with pytest.raises(errors.StageError, match=r"deleted while .* was computed; run the same command again"):
        compute(store_of_one)
    assert not list((store_of_one / "store").glob("evaluate/*/DONE"))


@pytest.mark.parametrize("file", ["stage.json", "DONE"])
def test_estimates_leave_out_what_is_damaged(file, store_of_one, capsys):
    (path,) = (store_of_one / "store").glob(f"align/*/{file}")
    store, other = Store(store_of_one), point(*TINY, OTHER, f"output_dir={store_of_one}")
    plan = make_plan([other], store)

    def source():
        return Cost(plan, store, Forecast(plan, lambda _: 1, all_rehearsed=False)).estimates["align"].source

    assert source() == "measured"  # the control
    empty(path)
    assert source() != "measured"
    assert capsys.readouterr().err.startswith(f"warning: {path}, line 1: damaged")


def test_progress_that_cannot_be_read_is_none(store_of_one):
    store = Store(store_of_one)
    (stage,) = (stage for stage in compute(store_of_one).stages.values() if stage.kind == "align")
    store.work(stage).mkdir(parents=True)
    path = store.work(stage) / "progress.json"
    progress = {"label": "x", "step": 1, "total": 2, "first": 0, "seconds": 1.0}
    path.write_text(json.dumps(with_checksum(progress)))
    assert store.progress(stage)["step"] == 1
    for content in ("", "[]", "{}", json.dumps(progress | {"step": "a"})):
        path.write_text(content)
        assert store.progress(stage) is None
