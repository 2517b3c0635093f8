"""The stages that make on-policy pairs: what they write, on two ranks and after a kill."""

import multiprocessing
import os
import shutil
import signal
from collections import Counter

import pytest
import torch
from safetensors.torch import save_file

from src.data.mini_tldr import gold_score
from src.data.sources import open_source
from src.data.training_prompts import training_prompts
from src.errors import StageError
from src.judges.answers import Answers
from src.planning.stage import stages_of
from src.stages import candidates, pairs, reference
from src.stages.runner import compute_or_wait
from src.stages.shared_rows import SharedRows
from src.store.files import read_json, read_jsonl
from src.store.store import Store
from tests.support.artifacts import results
from tests.support.configs import ON_POLICY, point
from tests.support.ranks import on_ranks
from tests.support.small_models import write_reward_model

MADE = ("candidates", "pairs", "reference")


def stages_in(folder, *overrides):
    return stages_of(point(*ON_POLICY, "method=dpo", f"output_dir={folder}", *overrides))


def compute(stages, folder, kinds):
    """Compute stages of these kinds, on every rank; return how many rows and rewards this rank has computed."""
    counts, save, add_all = Counter(), SharedRows.save, Answers.add_all

    def counted_save(self, rows):
        counts["rows"] += len(rows)
        save(self, rows)

    def counted_add(self, answers):
        counts["rewards"] += len(answers)
        add_all(self, answers)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SharedRows, "save", counted_save)
        patch.setattr(Answers, "add_all", counted_add)
        for stage in stages:
            if stage.kind in kinds:
                compute_or_wait(stage, Store(folder))
    return counts


@pytest.fixture(scope="module")
def rewards(tmp_path_factory):
    return ["pairs.judge=reward_model", f"pairs.model={write_reward_model(tmp_path_factory.mktemp('reward'))}"]


@pytest.fixture(scope="module")
def alone(rewards, tmp_path_factory):
    """Return an output_dir where one process has made pairs by gold scores and trained on them, and some by rewards."""
    folder = tmp_path_factory.mktemp("alone")
    on_ranks(1, "none", compute, stages_in(folder), folder, ("sft", *MADE, "align"))
    on_ranks(1, "none", compute, stages_in(folder, *rewards), folder, MADE)
    return folder


def copied(alone, folder):
    """Return a store with the SFT model alone."""
    shutil.copytree(alone / "store" / "sft", folder / "store" / "sft")
    return folder


def folder_of(stages, kind, folder):
    return Store(folder).dir(next(stage for stage in stages if stage.kind == kind))


def test_pairs_are_the_sampled_tokens_of_the_best_and_the_worst_response(alone):
    stages = stages_in(alone)
    stage = next(stage for stage in stages if stage.kind == "pairs")
    prompts, folder = training_prompts(stage.inputs.prompts), folder_of(stages, "pairs", alone)
    expected, dropped = [], 0
    for row in candidates.read(folder_of(stages, "candidates", alone)):
        facts, responses = prompts[row["index"]].facts, row["responses"]
        scores = [round(gold_score(facts, r["text"], r["finished"]), 6) for r in responses]
        best, worst = scores.index(max(scores)), scores.index(min(scores))
        if max(scores) == min(scores):
            dropped += 1
        else:
            expected.append((tuple(row["prompt"]), (tuple(responses[best]["ids"]), tuple(responses[worst]["ids"]))))
    examples = pairs.training_examples(stage.inputs, None, None, {"pairs": folder}, None).examples
    assert [(e.prompt, e.responses) for e in examples] == expected and 0 < dropped < 24
    counts = read_json(folder / "data.json")
    assert counts == {"prompts": 24, "pairs": 24 - dropped, "dropped": {"all grades equal": dropped}}
    for line in read_jsonl(folder / "pairs.jsonl"):
        assert line["chosen_grade"] > line["rejected_grade"] and line["chosen"] != line["rejected"]
    trained = read_json(folder_of(stages, "align", alone) / "data.json")
    assert trained["pairs"] == 24 - dropped and trained["dropped"]["train"] == {"all grades equal": dropped}


def test_the_texts_are_a_file_that_a_dataset_of_json_lines_reads(alone):
    file = folder_of(stages_in(alone), "pairs", alone) / "pairs.jsonl"
    data = stages_of(point("setup=smollm2_jsonl", "model=mini", f"dataset.path={file}", "beta=0.1"))[0].resources.pairs
    lines = list(read_jsonl(file))
    read = [*open_source(data).pairs("train"), *open_source(data).pairs("validation")]
    assert {(p.chosen, p.rejected) for p in read} == {(line["chosen"], line["rejected"]) for line in lines}


@pytest.mark.parametrize("graded_by", ["gold", "rewards"])
def test_samples_pairs_and_log_probs_of_two_ranks_are_those_of_one_process(graded_by, alone, rewards, tmp_path):
    overrides = rewards if graded_by == "rewards" else []
    folder, stages = copied(alone, tmp_path), stages_in(tmp_path, *overrides)
    counts = on_ranks(2, "ddp", compute, stages, folder, MADE)
    assert all(count["rows"] > 0 for count in counts), "every rank has a share"
    assert sum(count["rewards"] for count in counts) == (
        0 if graded_by == "gold" else len(distinct_texts(stages, folder))
    )
    made = {name: content for name, content in results(folder).items() if not name.startswith("sft/")}
    assert made.items() <= results(alone).items() and {name.partition("/")[0] for name in made} == set(MADE)


def distinct_texts(stages, folder):
    rows = candidates.read(folder_of(stages, "candidates", folder))
    return {(row["index"], response["text"]) for row in rows for response in row["responses"]}


def killed_in(method, num_calls, folder, stages, kinds):
    """Compute in a process that is killed when it has called a method, such as SharedRows.save, so many times."""
    owner, name = method
    whole = getattr(owner, name)
    calls = []

    def dies(self, rows):
        whole(self, rows)
        calls.append(rows)
        if len(calls) == num_calls:
            os.kill(os.getpid(), signal.SIGKILL)

    def run():
        torch.set_num_threads(1)  # a second thread waits for ever in a forked process
        setattr(owner, name, dies)
        compute_all(stages, folder, kinds)

    process = multiprocessing.get_context("fork").Process(target=run, daemon=True)
    process.start()
    process.join(120)
    assert process.exitcode == -signal.SIGKILL


def compute_all(stages, folder, kinds):
    for stage in stages:
        if stage.kind in kinds:
            compute_or_wait(stage, Store(folder))


def test_a_kill_while_sampling_or_grading_costs_no_row_that_was_written(alone, rewards, tmp_path):
    folder, stages = copied(alone, tmp_path), stages_in(tmp_path, *rewards)
    (calm,) = on_ranks(1, "none", compute, stages, copied(alone, tmp_path / "calm"), MADE)
    killed_in((SharedRows, "save"), 20, folder, stages, ["candidates"])
    (sampled,) = on_ranks(1, "none", compute, stages, folder, ["candidates"])
    assert sampled["rows"] == 24 * 3 - 2 * 8, "two batches were whole"
    killed_in((Answers, "add_all"), 2, folder, stages, ["pairs"])
    assert not (folder / "store" / "pairs").exists() or not list((folder / "store" / "pairs").glob("*/DONE"))
    (scored,) = on_ranks(1, "none", compute, stages, folder, ["pairs", "reference"])
    assert 0 < scored["rewards"] == calm["rewards"] - 2 * 16
    assert results(folder).items() <= results(alone).items()


def test_log_probs_of_other_pairs_are_refused(alone, tmp_path):
    stages = stages_in(alone)
    upstream = {role: folder_of(stages, role, alone) for role in ("reference", "pairs")}
    reference.check_pairs(upstream)
    other = tmp_path / "reference"
    shutil.copytree(upstream["reference"], other)
    save_file(reference.read(other), other / reference.FILE, {"pairs": "those of another attempt"})
    with pytest.raises(StageError, match=r"log-probs of other pairs than those in .* delete the former"):
        reference.check_pairs(upstream | {"reference": other})
