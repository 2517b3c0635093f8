"""Alignment that stops early and is resumed is bit for bit the model of an uninterrupted run."""

from dataclasses import replace
from pathlib import Path

import pytest

from src.planning.plan import Plan, make_plan
from src.stages.runner import compute_or_wait
from src.store.store import Store
from sweeps.search.successive_halving import with_stop
from tests.support.artifacts import results
from tests.support.configs import TINY, point


def train_to(folder: Path, *stop_fractions: float) -> tuple[Plan, Store]:
    """Train the point to each fraction of its steps in turn, and return the plan of the last."""
    from src.model.loading import set_cpu_threads

    store = Store(folder)
    for stop_fraction in stop_fractions:
        partial = with_stop(point(*TINY, f"output_dir={folder}"), stop_fraction)
        plan = make_plan([partial], store)
        set_cpu_threads(partial.engine.cpu_threads)
        for stage in plan.stages.values():
            if stage.kind in ("sft", "reference", "align"):
                compute_or_wait(stage, store)
    return plan, store


def align_of(plan: Plan):
    return next(stage for stage in plan.stages.values() if stage.kind == "align")


@pytest.fixture(scope="module")
def uninterrupted(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("uninterrupted")
    train_to(folder, 1.0)
    return {name: value for name, value in results(folder).items() if name.startswith("align/")}


def test_a_run_resumed_twice_equals_an_uninterrupted_one_bit_for_bit(tmp_path, uninterrupted, caplog):
    caplog.set_level("INFO")
    plan, store = train_to(tmp_path, 0.25, 0.625, 1.0)
    assert [m for m in caplog.messages if "resuming" in m] == ["resuming from step 2", "resuming from step 5"]
    artifacts = results(tmp_path)
    assert {name for name in uninterrupted if artifacts[name] != uninterrupted[name]} == set()
    identity = align_of(plan).identity
    assert any(name == f"align/{identity}/model.safetensors" for name in uninterrupted), "weights are compared"
    # The negative control: the partial run is another model, but has the same first steps.
    early = f"align/{identity}@0.25"
    assert artifacts[f"{early}/model.safetensors"] != artifacts[f"align/{identity}/model.safetensors"]
    assert artifacts[f"{early}/metrics.jsonl"] == artifacts[f"align/{identity}/metrics.jsonl"][:2]
    assert not store.work(align_of(plan)).exists(), "no checkpoint is left once the full run is done"


def test_without_a_checkpoint_a_longer_run_starts_from_step_0_and_ends_the_same(tmp_path, uninterrupted, caplog):
    plan, store = train_to(tmp_path, 0.5)
    assert [p.name for p in store.work(align_of(plan)).glob("checkpoints/sharded/*")] == ["step-00000004"]
    store.discard_work_dir(align_of(plan))
    caplog.set_level("INFO")
    train_to(tmp_path, 1.0)
    assert not [m for m in caplog.messages if "resuming" in m]
    artifacts = results(tmp_path)
    assert {name for name in uninterrupted if artifacts[name] != uninterrupted[name]} == set()


def test_a_shorter_run_does_not_resume_from_a_later_checkpoint(tmp_path, uninterrupted):
    plan, store = train_to(tmp_path / "a", 0.75)
    short, other = train_to(tmp_path / "a", 0.25)[0], train_to(tmp_path / "b", 0.25)[0]
    name = f"align/{align_of(short).identity}/model.safetensors"
    assert align_of(short).identity == align_of(other).identity
    assert results(tmp_path / "a")[name] == results(tmp_path / "b")[name]
    checkpoints = {p.name for p in store.work(align_of(plan)).glob("checkpoints/sharded/*")}
    assert checkpoints == {"step-00000002", "step-00000006"}, "the later checkpoint stays"


def test_partial_runs_of_one_training_have_its_identity_and_their_fraction():
    full = point(*TINY)
    plan = make_plan([full], Store("/nowhere"))
    half = make_plan([with_stop(full, 0.5)], Store("/nowhere"))
    assert align_of(half).identity == align_of(plan).identity + "@0.5"
    assert half.results != plan.results
    assert align_of(make_plan([replace(full, seed=1)], Store("/nowhere"))).identity != align_of(plan).identity
