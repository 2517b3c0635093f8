"""What a checkpoint can do by tasks of lm-eval: its own scores, the same documents for every point, asked once."""

import json
import math
from dataclasses import replace

import numpy as np
import pandas as pd
import pytest

from src.config import packages
from src.data.lm_eval_tasks import load_task, task_manager
from src.errors import ConfigError, StageError
from src.planning.stage import stages_of
from src.preflight import check_packages
from src.stages import capability, lm_eval_model
from src.stages.evaluate import mean_and_error
from src.stages.runner import compute_or_wait
from src.store.files import write_json
from src.store.store import CAPABILITY_FILE, RESULT_SCHEMA, Store
from sweeps.analysis.capability import ALL_TASKS, capability_changes
from tests.support.configs import TINY, point
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


def test_scores_are_those_of_lm_eval_on_the_published_checkpoint(tasks, store, asked):
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    sft = stage_of(tasks, "sft_capability").upstream["checkpoint"]
    model = HFLM(pretrained=str(store.dir(sft)), device="cpu", dtype="float32", batch_size=3)
    manager = task_manager(("sums", "echo"), str(tasks))
    own = {name: task for n in ("sums", "echo") for name, task in load_task(manager, n, str(tasks), None, 1234).items()}
    expected = evaluate(model, {"tasks": own})["results"]
    for name, task in capability.read(asked).items():
        metric = {"sums": "acc,none", "echo": "exact_match,none"}[name]
        values = list(task["values"].values())
        assert task["metric"] == metric and len(values) == {"sums": NUM_QUESTIONS, "echo": 6}[name]
        error = f"{metric.partition(',')[0]}_stderr,none"
        assert mean_and_error(values)["value"] == pytest.approx(expected[name][metric], abs=1e-12)
        assert mean_and_error(values)["se"] == pytest.approx(expected[name][error], abs=1e-12)
    scores = [row["scores"]["acc,none"] for row in documents(asked) if row["task"] == "sums"]
    assert 0 < sum(scores) < NUM_QUESTIONS, "the control: the scores of documents differ"
    assert all(isinstance(row["answer"], str) for row in documents(asked) if row["task"] == "echo")


def test_a_subset_is_drawn_once_by_its_seed_and_has_the_scores_of_the_whole_set(tasks, store, asked):
    first, other = (
        capability.read(compute_or_wait(stage_of(tasks, "sft_capability", *options, names=("sums",)), store))["sums"]
        for options in (["capability.limit=12"], ["capability.limit=12", "capability.seed=1"])
    )
    whole = capability.read(asked)["sums"]["values"]
    assert len(first["values"]) == len(other["values"]) == 12 and first["values"].keys() != other["values"].keys()
    assert first["values"].items() <= whole.items()
    assert [*first["values"]] == [document for document in whole if document in first["values"]]


def test_what_was_answered_before_an_attempt_ended_is_not_asked_again(tasks, store, asked, tmp_path, monkeypatch):
    monkeypatch.setattr(lm_eval_model, "CHUNK", 8)
    stage, num_asked, failing = stage_of(tasks, "sft_capability", "capability.limit=null"), [], [6]
    elsewhere = Store(tmp_path)
    for up in stage.upstream.values():
        elsewhere.dir(up).parent.mkdir(parents=True)
        elsewhere.dir(up).symlink_to(store.dir(up))
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


def test_the_sft_model_of_a_grid_is_asked_once_and_first_and_its_points_before_they_are_evaluated(tasks):
    grid = [stages_of(point(*TINY, *asking(tasks, "sums"), f"method={m}", "beta=0.1")) for m in ("dpo", "simpo")]
    of_sft = {stage.identity for stages in grid for stage in stages if stage.role == "sft_capability"}
    policies = {stage.identity for stages in grid for stage in stages if stage.role == "capability"}
    assert len(of_sft) == 1 and len(policies) == 2
    for stages in grid:
        assert stages[-1].kind == "evaluate"
        assert {"capability", "sft_capability"} <= stages[-1].upstream.keys()
    from_base = stages_of(point(*asking(tasks, "sums"), "init=base", "beta=0.1", "lr=1e-3"))
    assert "sft_capability" in {stage.role for stage in from_base}, "compared with the SFT model, too"
    without = {stage.identity for stage in stages_of(point(*TINY, "method=dpo", "beta=0.1"))}
    assert without - {stage.identity for stage in grid[0]} == {
        stage.identity for stage in stages_of(point(*TINY, "method=dpo", "beta=0.1")) if stage.kind == "evaluate"
    }, "asking changes nothing but the evaluation"


def test_a_task_of_ones_own_is_identified_by_its_content_and_not_by_its_place(tasks, tmp_path):
    copied = write_tasks(tmp_path / "copy")
    assert stage_of(copied, "capability").identity == stage_of(tasks, "capability").identity
    with (copied / "sums.jsonl").open("a") as data:
        data.write('{"question": "What is 1 plus 1? A: 2, B: 3, C: 4, D: 5.", "answer": 0}\n')
    assert stage_of(copied, "capability").identity != stage_of(tasks, "capability").identity


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["capability.tasks=[sum]"], "capability.tasks: lm-eval has no task sum, nor has .*did you mean sums[?]"),
        (["+capability.metrics.sums=accuracy"], "capability.metrics.sums=accuracy: its metrics are acc, acc_norm"),
        (["capability.tasks=[]"], "name at least one task"),
        (["capability.tasks=[sums,sums]"], "sums is named twice"),
        (["capability.task_files=/nowhere"], "capability.task_files=/nowhere: no such folder"),
        (["capability=none"], "capability.tasks=.*: capability=none measures nothing"),
    ],
)
def test_what_cannot_be_asked_is_refused_before_anything_runs(overrides, message, tasks, monkeypatch):
    # lm-eval's own tasks take seconds to list; a task of the folder is as near.
    monkeypatch.setattr("lm_eval.tasks.manager.__file__", str(tasks / "manager.py"))
    task_manager.cache_clear()
    with pytest.raises(ConfigError, match=message):
        check_packages([point(*asking(tasks, "sums"), *overrides)])


def test_data_outside_the_folder_of_tasks_are_refused(tmp_path):
    folder = write_tasks(tmp_path / "own")
    (folder / "sums.jsonl").rename(tmp_path / "sums.jsonl")
    text = (folder / "sums.yaml").read_text()
    (folder / "sums.yaml").write_text(text.replace("sums.jsonl", str(tmp_path / "sums.jsonl")))
    with pytest.raises(ConfigError, match="which is no file in that folder"):
        check_packages([point(*asking(folder, "sums"))])


def test_without_lm_eval_one_line_says_how_to_install_it(tasks, monkeypatch):
    monkeypatch.setattr(packages, "package_folder", lambda package: None)
    with pytest.raises(
        ConfigError, match=r"capability=subset needs the package lm_eval: pip install '.\[capability\]'"
    ):
        check_packages([point(*asking(tasks, "sums"))])


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


class Results:
    """Two seeds of a point, whose scores follow those of their SFT models."""

    def __init__(self, folder):
        self.folder, rng = folder, np.random.default_rng(0)
        self.scores = {}
        for seed in ("a", "b"):
            tasks = {}
            for name, size in (("easy", 300), ("hard", 30)):
                sft = rng.random(size)
                values = sft + 0.05 + 0.01 * rng.standard_normal(size)
                scores = {"documents": [*map(str, range(size))], "values": values.tolist(), "sft": sft.tolist()}
                tasks[name] = {"metric": "acc,none", **scores}
            (folder / seed).mkdir()
            write_json(folder / seed / CAPABILITY_FILE, {"schema": RESULT_SCHEMA, "tasks": tasks})
            self.scores[seed] = tasks

    def artifacts(self, result, role):
        assert role == "evaluate"
        return self.folder / result


def test_the_change_of_a_point_is_paired_by_document_and_averaged_over_seeds(tmp_path):
    results = Results(tmp_path)
    row = {"setup": "s", "method": "dpo", "init": "sft", "variant": "", "beta": 0.1, "lr": 1e-6}
    best = pd.DataFrame([row | {"identities": ["a", "b"]}])
    table = capability_changes(best, results).set_index("task")
    assert list(table.index) == ["easy", "hard", ALL_TASKS]
    for name in ("easy", "hard"):
        pairs = [np.subtract(seed[name]["values"], seed[name]["sft"]) for seed in results.scores.values()]
        difference = np.mean(pairs, axis=0)
        assert table.difference[name] == pytest.approx(difference.mean())
        half_width = 1.96 * difference.std(ddof=1) / math.sqrt(len(difference))
        assert (table.high[name] - table.low[name]) / 2 == pytest.approx(half_width, rel=0.1)
        unpaired = math.hypot(
            *(np.mean([s[name][k] for s in results.scores.values()], axis=0).std() for k in ("values", "sft"))
        )
        assert half_width < 0.2 * 1.96 * unpaired / math.sqrt(len(difference)), "the control: unpaired it is wider"
    # Both tasks weigh the same, though one has ten times the documents.
    assert table.difference[ALL_TASKS] == pytest.approx((table.difference["easy"] + table.difference["hard"]) / 2)
    assert table.low[ALL_TASKS] < table.difference[ALL_TASKS] < table.high[ALL_TASKS] and table.p[ALL_TASKS] < 1e-6
    assert capability_changes(best.iloc[:0], results).columns.empty, "and without any there is no table"
