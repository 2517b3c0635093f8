"""Alignment that stops early, and goes on: prolonged = trained through, bit for bit."""

from dataclasses import replace
from pathlib import Path

import pytest

from src.config.validation import build_point
from src.planning.plan import Plan, make_plan
from src.stages.runner import compute_or_wait
from src.store.store import Store
from sweeps.search.successive_halving import stopped
from tests.support.artifacts import results
from tests.support.configs import composed

TINY = [
    *("dataset.sft_size=64", "dataset.train_size=64", "dataset.validation_size=8", "evaluation.num_prompts=8"),
    *("evaluation.generation.max_new_tokens=8", "trainer.align.batch_size=8", "trainer.sft.max_steps=2"),
    "trainer.save_steps=3",
]


def aligned(folder: Path, *stops: float) -> tuple[Plan, Store]:
    """Train the point to each stop in turn; the plan of the last."""
    from src.model.loading import set_cpu_threads

    store = Store(folder)
    for stop in stops:
        point = stopped(build_point(composed(*TINY, f"output_dir={folder}")), stop)
        plan = make_plan([point], store)
        set_cpu_threads(point.engine)
        for stage in plan.stages.values():
            if stage.kind in ("sft", "reference", "align"):
                compute_or_wait(stage, store)
    return plan, store


def align_of(plan: Plan):
    return next(stage for stage in plan.stages.values() if stage.kind == "align")


@pytest.fixture(scope="module")
def through(tmp_path_factory) -> dict[str, object]:
    folder = tmp_path_factory.mktemp("through")
    aligned(folder, 1.0)
    return {name: value for name, value in results(folder).items() if name.startswith("align/")}


def test_prolonged_twice_is_what_training_through_is_bit_for_bit(tmp_path, through, caplog):
    caplog.set_level("INFO")
    plan, store = aligned(tmp_path, 0.25, 0.625, 1.0)
    assert [m for m in caplog.messages if "resuming" in m] == ["resuming from step 2", "resuming from step 5"]
    found = results(tmp_path)
    assert {name for name in through if found[name] != through[name]} == set()
    whole = align_of(plan).identity
    assert any(name == f"align/{whole}/model.safetensors" for name in through), "weights are compared"
    # The negative control: what stopped early is something else, though it shares its beginning.
    early = f"align/{whole}@0.25"
    assert found[f"{early}/model.safetensors"] != found[f"align/{whole}/model.safetensors"]
    assert found[f"{early}/metrics.jsonl"] == found[f"align/{whole}/metrics.jsonl"][:2]
    assert not store.work(align_of(plan)).exists(), "the whole run is there: nothing is kept to go on from"


def test_without_its_checkpoint_a_longer_part_starts_anew_and_ends_the_same(tmp_path, through, caplog):
    plan, store = aligned(tmp_path, 0.5)
    assert [p.name for p in store.work(align_of(plan)).glob("checkpoints/whole/*")] == ["step-00000004"]
    store.forget(align_of(plan))
    caplog.set_level("INFO")
    aligned(tmp_path, 1.0)
    assert not [m for m in caplog.messages if "resuming" in m]
    found = results(tmp_path)
    assert {name for name in through if found[name] != through[name]} == set()


def test_a_shorter_part_does_not_go_on_from_a_later_checkpoint(tmp_path, through):
    """A run that got further, and was interrupted there, is no start for a part that stops before."""
    plan, store = aligned(tmp_path / "a", 0.75)
    short, other = aligned(tmp_path / "a", 0.25)[0], aligned(tmp_path / "b", 0.25)[0]
    name = f"align/{align_of(short).identity}/model.safetensors"
    assert align_of(short).identity == align_of(other).identity
    assert results(tmp_path / "a")[name] == results(tmp_path / "b")[name]
    kept = {p.name for p in store.work(align_of(plan)).glob("checkpoints/whole/*")}
    assert kept == {"step-00000002", "step-00000006"}, "nor does it take the later one away"


def test_a_run_to_its_end_has_the_identity_it_always_had():
    """Results from before there was a stop are found: the fields of a whole run do not name it."""
    whole = build_point(composed(*TINY))
    plan = make_plan([whole], Store("/nowhere"))
    assert "stop" not in align_of(plan).fields["trainer"]
    half = make_plan([stopped(whole, 0.5)], Store("/nowhere"))
    assert align_of(half).identity == align_of(plan).identity + "@0.5"
    assert half.results != plan.results
    assert align_of(make_plan([replace(whole, seed=1)], Store("/nowhere"))).identity != align_of(plan).identity
