"""Stages that several ranks compute together: the artifacts are those of one process, whatever their number."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from src.data.tokenization import load_examples
from src.model.loading import load_for_inference, load_template
from src.planning.stage import stages_of
from src.stages import align, reference
from src.stages.runner import compute_or_wait
from src.store.store import Store
from tests.support.artifacts import results
from tests.support.configs import TINY, point
from tests.support.ranks import on_ranks
from tests.support.small_models import write_reward_model

# Several batches of everything, so that every rank has some.
BATCHES = ["trainer.max_tokens_per_micro_batch=512", "evaluation.generation.batch_size=2"]
INFERENCE = ("reference", "generate", "evaluate")


def compute(stages, folder, kinds):
    """Compute stages of these kinds; called on every rank."""
    for stage in stages:
        if stage.kind in kinds:
            compute_or_wait(stage, Store(folder))


def stages_in(folder, *overrides):
    return stages_of(point(*TINY, *BATCHES, "method=dpo", "beta=0.1", f"output_dir={folder}", *overrides))


@pytest.fixture(scope="module")
def judge(tmp_path_factory):
    return ["judge=reward_model", f"judge.model={write_reward_model(tmp_path_factory.mktemp('reward'))}"]


@pytest.fixture(scope="module")
def alone(judge, tmp_path_factory):
    """Return an output_dir in which one process has computed everything, with one thread as every rank has."""
    folder = tmp_path_factory.mktemp("alone")
    on_ranks(1, "none", compute, stages_in(folder, *judge), folder, ("sft", "align", *INFERENCE))
    return folder


def trained_copy(alone: Path, folder: Path, *missing: str) -> Path:
    """Return a copy of the store without the stages of some kinds, and without the judge's answers."""
    shutil.copytree(alone / "store", folder / "store")
    for kind in (*missing, "answers"):
        shutil.rmtree(folder / "store" / kind)
    return folder


def done(folder: Path, kind: str) -> list[dict]:
    return [json.loads(path.read_text()) for path in (folder / "store" / kind).glob("*/DONE")]


@pytest.mark.parametrize("num_ranks", [2, 3])
def test_log_probs_samples_and_rewards_of_several_ranks_are_those_of_one_process(num_ranks, alone, judge, tmp_path):
    folder = trained_copy(alone, tmp_path, *INFERENCE)
    on_ranks(num_ranks, "ddp", compute, stages_in(folder, *judge), folder, INFERENCE)
    assert results(folder) == results(alone)
    for kind in INFERENCE:
        assert {record["processes"] for record in done(folder, kind)} == {num_ranks}
        assert {record["processes"] for record in done(alone, kind)} == {1}
    (result,) = (folder / "store" / "evaluate").glob("*/result.json")
    took = {stage["stage"]: stage["processes"] for stage in json.loads(result.read_text())["stages"]}
    assert took == {"sft": 1, "align": 1, "reference": num_ranks, "generate": num_ranks, "evaluate": num_ranks}
    assert not list((folder / "store").glob("*/.work/*"))


def test_the_comparison_notices_batches_of_another_shape(alone, tmp_path):
    """The control: log-probs of other micro-batches are equal to rounding, and not to the bit."""
    folder = trained_copy(alone, tmp_path, *INFERENCE)
    stages = stages_in(folder, "trainer.max_tokens_per_micro_batch=16384")
    on_ranks(1, "none", compute, stages, folder, ("reference",))
    ours, theirs = (load_file(next((f / "store").glob(f"reference/*/{reference.FILE}"))) for f in (folder, alone))
    torch.testing.assert_close(ours["train"], theirs["train"])
    assert not torch.equal(ours["train"], theirs["train"])


def test_a_judge_without_a_model_is_left_to_rank_0(alone, tmp_path):
    folder = trained_copy(alone, tmp_path, "evaluate")
    on_ranks(2, "ddp", compute, stages_in(folder), folder, ("evaluate",))
    (record,) = done(folder, "evaluate")
    assert record["processes"] == 1


def validate(stage, folder):
    """Return the lines of validation of the published model, by the one process that calls this."""
    published, inputs, resources = Store(folder).dir(stage), stage.inputs, stage.resources
    store = Store(folder)
    attempt = store.join_attempt(stage, published)
    template = load_template(inputs.model)
    data = load_examples(inputs.data, inputs.model, "validation", template, attempt, resources.expected_rows)
    references = reference.read(store.dir(stage.upstream["reference"]))["validation"]
    model = load_for_inference(inputs.model, resources, published)
    return align._validate(inputs, resources, model, data, references, attempt)


@pytest.mark.parametrize("engine", ["ddp", "fsdp"])
def test_validation_by_all_ranks_is_that_of_the_published_model(engine, alone, tmp_path):
    folder = trained_copy(alone, tmp_path, "align", "generate", "evaluate")
    stages = stages_in(folder, f"engine={engine}", "engine.precision=fp32")
    on_ranks(2, engine, compute, stages, folder, ("align",))
    (aligned,) = (stage for stage in stages if stage.kind == "align")
    (expected,) = on_ranks(1, "none", validate, aligned, folder)
    lines = (Store(folder).dir(aligned) / align.VALIDATION_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected and len(lines) == 8
    (ours,), (theirs,) = done(folder, "align"), done(alone, "align")
    assert ours["tokens"] == theirs["tokens"], "those of all ranks are counted"
