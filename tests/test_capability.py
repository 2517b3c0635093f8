"""What a checkpoint can do by tasks of lm-eval: its own scores, the same documents for every point, asked once."""

import json
import sys
from dataclasses import replace

import pytest
from lm_eval.evaluator import evaluate
from lm_eval.models.huggingface import HFLM
from transformers import AutoTokenizer

from src.data.lm_eval_tasks import load_task, task_manager
from src.data.rows import Prompt
from src.data.templates import Template
from src.errors import StageError
from src.planning.stage import stages_of
from src.stages import capability, lm_eval_model
from src.stages.averages import mean_and_error
from src.stages.runner import compute_or_wait
from src.stages.shared_rows import SharedRows
from src.store.store import Store
from tests.support.chat_model import write_chat_model
from tests.support.commands import ROOT
from tests.support.configs import TINY, point
from tests.support.ranks import on_ranks
from tests.support.tasks import NUM_QUESTIONS, asking, write_tasks


@pytest.fixture(scope="module")
def tasks(tmp_path_factory):
    return write_tasks(tmp_path_factory.mktemp("tasks") / "own")


@pytest.fixture(scope="module")
def store(tmp_path_factory):
    """A store with an SFT model."""
    return Store(tmp_path_factory.mktemp("store"))


def stage_of(tasks, role, *overrides, names=("sums", "echo")):
    stages = stages_of(point(*TINY, *asking(tasks, *names), *overrides))
    return next(stage for stage in stages if stage.role == role)


def documents(folder):
    return [json.loads(line) for line in (folder / capability.DOCUMENTS_FILE).open()]


@pytest.fixture(scope="module")
def asked(tasks, store):
    """The folder of all documents asked of the SFT model."""
    return compute_or_wait(stage_of(tasks, "sft_capability", "capability.limit=null"), store)


@pytest.fixture
def elsewhere(store, asked, tmp_path):
    """A store with the same SFT model, of which nothing has been asked."""
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "sft").symlink_to(store.root / "sft")
    return Store(tmp_path)


def test_log_probs_texts_and_scores_are_those_of_lm_eval_on_the_published_checkpoint(
    tasks, store, elsewhere, monkeypatch
):
    asked, answers = [], lm_eval_model.SharedModel._answers

    def noted(self, kind, requests):
        asked.append((kind, requests, answers(self, kind, requests)))
        return asked[-1][-1]

    monkeypatch.setattr(lm_eval_model.SharedModel, "_answers", noted)
    stage = stage_of(tasks, "sft_capability", "capability.limit=null", "capability.chat_template=false")
    ours = capability.read(compute_or_wait(stage, elsewhere))

    checkpoint = str(store.dir(stage.upstream["checkpoint"]))
    model = HFLM(pretrained=checkpoint, device="cpu", dtype="float32", batch_size=3)
    assert {kind for kind, _, _ in asked} == {"loglikelihood", "generate_until"}
    for kind, requests, answered in asked:
        expected = getattr(model, kind)(requests)
        if kind == "loglikelihood":
            expected, answered = ([logp for logp, _ in pairs] for pairs in (expected, answered))
            assert len(set(answered)) > NUM_QUESTIONS, "the control: they differ"
        assert answered == pytest.approx(expected, abs=1e-4) if kind == "loglikelihood" else answered == expected
    monkeypatch.chdir(tasks.parent)  # the folder may be named relative to where the command is run
    manager = task_manager(["sums", "echo"], "own")
    own = {name: task for n in ("sums", "echo") for name, task in load_task(manager, n, "own", None, 1234).items()}
    expected = evaluate(model, {"tasks": own})["results"]
    for name, metric in (("sums", "acc"), ("echo", "exact_match")):
        scores = mean_and_error([*ours[name]["values"].values()])
        assert ours[name]["metric"] == f"{metric},none" and scores["n"] == {"sums": NUM_QUESTIONS, "echo": 6}[name]
        assert scores["value"] == pytest.approx(expected[name][f"{metric},none"], abs=1e-12)
        assert scores["se"] == pytest.approx(expected[name][f"{metric}_stderr,none"], abs=1e-12)
    assert 0 < expected["sums"]["acc,none"] < 1


@pytest.mark.parametrize(("name", "system_prompt"), [("plain", None), ("tokenizer", None), ("tokenizer", "Be brief.")])
def test_a_prompt_is_written_as_the_model_was_trained_on_it(name, system_prompt, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(write_chat_model(tmp_path / "model"))
    template = Template(name, tokenizer, system_prompt=system_prompt)
    model = lm_eval_model.SharedModel(None, template, None)
    messages = [
        {"role": "user", "content": "A?"},
        {"role": "assistant", "content": "b"},
        {"role": "user", "content": "C?"},
    ]
    text = model.apply_chat_template(messages)
    assert tokenizer.encode(text, add_special_tokens=False) == template.prompt_ids(Prompt(tuple(messages)))
    begun = model.apply_chat_template([*messages, {"role": "assistant", "content": "The"}], add_generation_prompt=False)
    assert begun == f"{text}The"


def test_a_subset_is_drawn_once_by_its_seed_and_has_the_scores_of_the_whole_set(tasks, store, asked):
    first, other = (
        capability.read(compute_or_wait(stage_of(tasks, "sft_capability", *options, names=("sums",)), store))["sums"]
        for options in (["capability.limit=12"], ["capability.limit=12", "capability.seed=1"])
    )
    whole = capability.read(asked)["sums"]["values"]
    assert len(first["values"]) == len(other["values"]) == 12 and first["values"].keys() != other["values"].keys()
    assert first["values"].items() <= whole.items()
    assert [*first["values"]] == [document for document in whole if document in first["values"]]


def test_what_was_answered_before_an_attempt_ended_is_not_asked_again(tasks, asked, elsewhere, monkeypatch):
    monkeypatch.setattr(lm_eval_model, "CHUNK", 8)
    stage, num_asked, failing = stage_of(tasks, "sft_capability", "capability.limit=null"), [], [6]
    loaded = lm_eval_model._loaded

    def counting(*arguments):
        model = loaded(*arguments)
        original = model.loglikelihood

        def loglikelihood(requests, disable_tqdm):
            if failing and len(num_asked) == failing[0]:
                raise RuntimeError("out of memory")
            num_asked.append(len(requests))
            return original(requests, disable_tqdm=disable_tqdm)

        model.loglikelihood = loglikelihood
        return model

    monkeypatch.setattr(lm_eval_model, "_loaded", counting)
    with pytest.raises(StageError, match="sums: RuntimeError: out of memory"):
        compute_or_wait(stage, elsewhere)
    assert not elsewhere.is_done(stage)
    failing.clear()
    folder = compute_or_wait(stage, elsewhere)
    assert sum(num_asked) == 4 * NUM_QUESTIONS and num_asked[:6] == [8] * 6
    assert documents(folder) == documents(asked), "nor do chunks change a score"


def compute(stage, store):
    """Compute a stage on every rank; return how many rows this one has."""
    counts, save = [], SharedRows.save
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(lm_eval_model, "CHUNK", 16)
        patch.setattr(SharedRows, "save", lambda self, rows: (counts.append(len(rows)), save(self, rows)))
        compute_or_wait(stage, store)
    return sum(counts)


def test_ranks_share_the_questions_and_have_the_scores_of_one_process(tasks, asked, elsewhere):
    stage = stage_of(tasks, "sft_capability", "capability.limit=null")
    counts = on_ranks(2, "ddp", compute, stage, elsewhere)
    assert documents(elsewhere.dir(stage)) == documents(asked)
    assert min(counts) > 0 and sum(counts) == 4 * NUM_QUESTIONS + 6


@pytest.mark.slow
def test_a_vllm_server_is_asked_for_log_probs_and_texts_and_is_sent_no_key(tasks, asked, elsewhere, monkeypatch):
    monkeypatch.setenv("OPENAI_API_KEY", "sk-canary")
    program = ROOT / "tests" / "support" / "completions_server.py"
    command = f"server.command='{sys.executable} {program} {{checkpoint}} {{port}}'"
    stage = stage_of(tasks, "sft_capability", "capability.limit=12", "server=vllm", command)
    assert stage.packages == ("lm-eval", "vllm")
    received = []
    monkeypatch.setattr(
        elsewhere, "clean_up_work_dir", lambda done: received.extend(elsewhere.work(done).rglob("requests.jsonl"))
    )
    folder = compute_or_wait(stage, elsewhere)
    answered = documents(folder)
    assert answered == [row for row in documents(asked) if row in answered]
    (log,) = received
    assert len(log.read_text().splitlines()) == 4 * 12 + 6 and "canary" not in log.read_text()


def test_a_metric_of_which_less_is_better_is_no_capability(tasks):
    class Task:
        def higher_is_better(self):
            return {"perplexity": False}

    inputs = replace(stage_of(tasks, "capability").inputs.tasks[0], metric=None)
    rows = [{"scores": {"perplexity,none": 9.0}}]
    with pytest.raises(StageError, match="of which more is better; the task has none"):
        capability._metric(inputs, rows, {"sums": Task()})
    both = [{"scores": {"perplexity,none": 9.0, "acc,none": 1.0}}]
    assert capability._metric(inputs, both, {"sums": Task()}) == "acc,none"
