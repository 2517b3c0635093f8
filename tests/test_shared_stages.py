"""Stages that several ranks compute together: the artifacts are those of one process, whatever their number."""

import itertools
import json
import shutil
import statistics
import time
from collections import Counter
from pathlib import Path

import pytest

from src.data.tokenization import load_examples
from src.distributed import get_distributed
from src.errors import ConfigError
from src.model.adapters import is_adapter
from src.model.loading import load_for_inference, load_template
from src.planning.stage import stages_of
from src.stages import align, generate, reference
from src.stages.runner import compute_or_wait
from src.stages.shared_rows import SharedRows
from src.store.store import VALIDATION_FILE, Store
from tests.support.artifacts import results
from tests.support.configs import TINY, point
from tests.support.endpoint import smollm2_folder
from tests.support.ranks import on_ranks
from tests.support.small_models import smollm2_template, write_reward_model

# Several batches of everything, so that every rank has some.
BATCHES = ["trainer.max_tokens_per_micro_batch=512", "evaluation.generation.batch_size=2"]
LARGE = [
    *("dataset.validation_size=512", "evaluation.num_prompts=512", "evaluation.generation.batch_size=64"),
    "evaluation.generation.max_new_tokens=48",
]
INFERENCE = ("reference", "generate", "evaluate")


def compute(stages, folder, kinds):
    """Compute stages of these kinds, on every rank; return how many rows this one has computed of each."""
    counts, save = Counter(), SharedRows.save
    with pytest.MonkeyPatch.context() as patch:
        for stage in stages:
            if stage.kind in kinds:

                def counted(self, rows, kind=stage.kind):
                    counts[kind] += len(rows)
                    save(self, rows)

                patch.setattr(SharedRows, "save", counted)
                compute_or_wait(stage, Store(folder))
    return counts


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


@pytest.mark.parametrize("num_ranks", [2, pytest.param(3, marks=pytest.mark.slow)])
def test_log_probs_samples_and_rewards_of_several_ranks_are_those_of_one_process(num_ranks, alone, judge, tmp_path):
    folder = trained_copy(alone, tmp_path, *INFERENCE)
    counts = on_ranks(num_ranks, "ddp", compute, stages_in(folder, *judge), folder, INFERENCE)
    assert results(folder) == results(alone)
    for kind in ("reference", "generate"):
        assert all(count[kind] > 0 for count in counts), f"every rank computes some of {kind}"
    assert sum(count["reference"] for count in counts) == 64 + 8
    assert sum(count["generate"] for count in counts) == 2 * (8 + 8)  # samples and scores, of policy and baseline
    assert len(list((folder / "store" / "answers").rglob("*.jsonl"))) == 2, "ranks with a batch of rewards"
    for kind in INFERENCE:
        assert {record["processes"] for record in done(folder, kind)} == {num_ranks}
        assert {record["processes"] for record in done(alone, kind)} == {1}
    (result,) = (folder / "store" / "evaluate").glob("*/result.json")
    took = {stage["stage"]: stage["processes"] for stage in json.loads(result.read_text())["stages"]}
    assert took == {"sft": 1, "align": 1, "reference": num_ranks, "generate": num_ranks, "evaluate": num_ranks}
    assert not list((folder / "store").glob("*/.work/*"))


def test_both_turns_of_conversations_of_several_ranks_are_those_of_one_process(alone, tmp_path):
    questions = tmp_path / "question.jsonl"
    rows = ({"question_id": n, "category": "abc"[n % 3], "turns": [f"Name {n}.", f"Why {n}?"]} for n in range(6))
    questions.write_text("\n".join(map(json.dumps, rows)))
    overrides = [
        *("evaluation=mt_bench", f"evaluation.prompts_file={questions}", "evaluation.num_prompts=6"),
        *("evaluation.generation.max_new_tokens=8", "+evaluation.generation.temperatures.a=0", "judge=mt_bench"),
        *("evaluation.generation.batch_size=2", "judge.base_url=http://127.0.0.1:9/v1"),
    ]
    samples = []
    for num_ranks, strategy in ((1, "none"), (2, "ddp")):
        folder = trained_copy(alone, tmp_path / strategy, "generate", "evaluate")
        counts = on_ranks(num_ranks, strategy, compute, stages_in(folder, *overrides), folder, ("generate",))
        assert sum(count["generate"] for count in counts) == 2 * 12 and all(count["generate"] for count in counts)
        (file,) = (folder / "store" / "generate").glob("*/samples.jsonl")
        samples.append(file.read_text())
    assert samples[0] == samples[1] and samples[0].count('"turn": 2') == 6


def test_a_judge_without_a_model_is_left_to_rank_0(alone, tmp_path):
    folder = trained_copy(alone, tmp_path, "evaluate")
    on_ranks(2, "ddp", compute, stages_in(folder), folder, ("evaluate",))
    (record,) = done(folder, "evaluate")
    assert record["processes"] == 1


def validate(stage, folder):
    """Return the lines of validation of what is published, by the one process that calls this."""
    store, inputs, resources = Store(folder), stage.inputs, stage.resources
    attempt = store.join_attempt(stage, store.dir(stage))
    template = load_template(inputs.model)
    data = load_examples(inputs.data, inputs.model, "validation", template, attempt, resources.expected_rows)
    references = reference.read(store.dir(stage.upstream["reference"]))["validation"]
    model = load_for_inference(inputs.model, resources, store.dir(stage), store.dir(stage.upstream["init"]))
    return align._validate(inputs, resources, model, data, references, attempt)


@pytest.mark.parametrize(
    ("engine", "lora"),
    [pytest.param("ddp", [], marks=pytest.mark.slow), ("fsdp", []), ("fsdp", ["model.lora.rank=4"])],
)
def test_validation_by_all_ranks_is_that_of_what_is_published(engine, lora, alone, tmp_path):
    """With FSDP2 ranks other than 0 load it: a model, or adapters that they merge into what training started from."""
    folder = trained_copy(alone, tmp_path, "align", "generate", "evaluate")
    stages = stages_in(folder, f"engine={engine}", "engine.precision=fp32", *lora)
    counts = on_ranks(2, engine, compute, stages, folder, ("align",))
    assert all(count["align"] > 0 for count in counts), "every rank computes some lines"
    (aligned,) = (stage for stage in stages if stage.kind == "align")
    published = Store(folder).dir(aligned)
    assert is_adapter(published) == bool(lora)
    (expected,) = on_ranks(1, "none", validate, aligned, folder)
    assert all(line["margin"] for line in expected), "the control: that of what training started from is 0"
    lines = (published / VALIDATION_FILE).read_text().splitlines()
    assert [json.loads(line) for line in lines] == expected and len(lines) == 8
    (ours,), (theirs,) = done(folder, "align"), done(alone, "align")
    assert ours["tokens"] == theirs["tokens"], "those of all ranks are counted"


def compute_until_rank_1_fails(stages, folder):
    """Sample; rank 1 fails in its second batch. Return what the run raises on this rank, and after how many seconds."""
    if get_distributed().rank == 1:
        save, calls = SharedRows.save, itertools.count()

        def failing(self, rows):
            if next(calls) == 3:
                raise ConfigError("model.path: rank 1 cannot read it")
            save(self, rows)

        SharedRows.save = failing  # of this forked process
    started = time.monotonic()
    try:
        compute(stages, folder, ("generate",))
    except ConfigError as error:
        return str(error), time.monotonic() - started
    return None


def test_an_error_of_one_rank_ends_all_publishes_nothing_and_loses_nothing(alone, judge, tmp_path):
    folder = trained_copy(alone, tmp_path, "generate", "evaluate")
    stages = stages_in(folder, *judge)
    errors = on_ranks(2, "ddp", compute_until_rank_1_fails, stages, folder)
    assert [message for message, _ in errors] == ["model.path: rank 1 cannot read it"] * 2
    assert max(seconds for _, seconds in errors) < 60
    assert not list((folder / "store").glob("generate/*/DONE"))
    counts = on_ranks(1, "none", compute, stages, folder, ("generate", "evaluate"))
    assert results(folder) == results(alone)
    assert counts[0]["generate"] < 2 * (8 + 8), "what both had sampled is not sampled again"


PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris.", "I like turtles, and also the sea."),
    ("Name three colors.", "Red, green and blue.", "Colors are names that are three."),
    ("How many days are in a week?", "There are seven days in a week.", "There are many days, as many as you wish."),
    ("What do bees make?", "Bees make honey.", "Bees make a fine coffee in the morning."),
    ("Is water wet?", "Yes, water is wet.", "Water was a president of the moon."),
    ("Say hello.", "Hello! How can I help you today?", "Goodbye."),
]


@pytest.mark.slow
def test_two_ranks_score_and_sample_with_smollm2_as_one_process_does(tmp_path):
    smollm2_template()  # or skip
    one, two, file, model = (tmp_path / name for name in ("one", "two", "pairs.jsonl", "model"))
    on_ranks(1, "none", smollm2_folder, model)  # loads in a tenth of the time of the GGUF file
    rows = [{"prompt": prompt, "chosen": chosen, "rejected": rejected} for prompt, chosen, rejected in PAIRS]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))

    def stages(folder):
        overrides = [
            *("setup=smollm2_jsonl", f"model.path={model}", f"dataset.path={file}", "dataset.validation_size=2"),
            *("init=base", "method=dpo", "beta=0.1", "lr=1e-5"),
            *("trainer.align.batch_size=2", "trainer.align.max_steps=1", "trainer.max_tokens_per_micro_batch=64"),
            *("evaluation.generation.batch_size=1", "evaluation.generation.max_new_tokens=8"),
        ]
        return stages_of(point(*overrides, f"output_dir={folder}"))

    on_ranks(1, "none", compute, stages(one), one, ("align", *INFERENCE))
    shutil.copytree(one / "store", two / "store")
    for kind in INFERENCE:
        shutil.rmtree(two / "store" / kind)
    counts = on_ranks(2, "ddp", compute, stages(two), two, INFERENCE)
    assert all(count[kind] for count in counts for kind in ("reference", "generate"))
    assert results(two) == results(one)


def seconds_of_sampling(stages, folder):
    """Compute the samples of the policy; return the seconds that this rank samples and waits for the others."""
    seconds, sample = [], generate._sample

    def timed(*arguments):
        started = time.perf_counter()
        responses = sample(*arguments)
        seconds.append(time.perf_counter() - started)
        return responses

    generate._sample = timed  # of this forked process
    compute(stages, folder, ("generate",))
    return max(seconds)


@pytest.mark.timing
def test_two_ranks_sample_in_six_tenths_of_the_time_of_one(alone, tmp_path):
    """With a thread each, 512 prompts in batches of 64; both are measured in turn."""
    took = {1: [], 2: []}
    for repeat in range(5):
        for num_ranks, seconds in took.items():
            folder = trained_copy(alone, tmp_path / f"{num_ranks}-{repeat}", "generate", "evaluate")
            stages = stages_of(point(*TINY, *LARGE, "method=dpo", "beta=0.1", f"output_dir={folder}"))
            seconds.append(max(on_ranks(num_ranks, "ddp", seconds_of_sampling, stages, folder)))
    one, two = (statistics.median(seconds) for seconds in took.values())
    print(f"one process {one:.2f} s, two ranks {two:.2f} s: {two / one:.2f}")
    assert two <= 0.6 * one, took
