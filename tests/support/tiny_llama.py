"""A small random Llama with a tokenizer like Llama 3's, and small tables in the layout of hub datasets."""

from __future__ import annotations

import random
from pathlib import Path

import pandas as pd
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

_SPECIAL = ["<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
_WORDS = ["the", "cat", "dog", "ran", "sat", "house", "tree", "big", "small", "red", "and", "then", "why", "how", "is"]


def byte_level_bpe(special_tokens: list[str]) -> Tokenizer:
    """Return a byte-level BPE of few words, with these tokens first."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(vocab_size=320, special_tokens=special_tokens, initial_alphabet=alphabet)
    bpe.train_from_iterator([" ".join(_WORDS)] * 10, trainer)
    return bpe


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE with Llama 3's special tokens and no chat template, like its base models."""
    bpe = byte_level_bpe(_SPECIAL)
    return PreTrainedTokenizerFast(tokenizer_object=bpe, bos_token="<|begin_of_text|>", eos_token="<|end_of_text|>")


def model(folder: Path) -> Path:
    """Write a random model of two layers with its tokenizer; return the folder."""
    fast = tokenizer()
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(fast),
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=8192,
        tie_word_embeddings=True,
        bos_token_id=fast.bos_token_id,
        eos_token_id=fast.eos_token_id,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    return folder


def _text(generator: random.Random, min_words: int, max_words: int) -> str:
    return " ".join(generator.choices(_WORDS, k=generator.randint(min_words, max_words)))


def _write(folder: Path, splits: dict[str, list[dict]]) -> None:
    """Write each split as a parquet file, in the layout of hub datasets."""
    (folder / "data").mkdir(parents=True)
    for split, rows in splits.items():
        pd.DataFrame(rows).to_parquet(folder / "data" / f"{split}-00000-of-00001.parquet")


def tldr(folder: Path, rows: int = 32) -> Path:
    """Write an SFT and a preference table in the layout of trl-lib/tldr-preference.

    Some pairs are duplicates, others have chosen and rejected swapped.
    """
    draw = random.Random(0)

    def pair() -> dict:
        post = f"TITLE: {_text(draw, 3, 6)}\n\nPOST: {_text(draw, 20, 60)}"
        prompt = f"SUBREDDIT: r/{_text(draw, 1, 1)}\n\n{post}\n\nTL;DR:"
        return {"prompt": prompt, "chosen": f" {_text(draw, 4, 12)}", "rejected": f" {_text(draw, 4, 12)}"}

    def table(count: int) -> list[dict]:
        pairs = [pair() for _ in range(count)]
        return pairs + pairs[:2] + [p | {"chosen": p["rejected"], "rejected": p["chosen"]} for p in pairs[2:4]]

    splits = {"train": table(rows), "validation": table(rows // 2)}
    for name in ("sft", "preference"):
        _write(folder / name, splits)
    return folder


def ultrachat_ultrafeedback(folder: Path, rows: int = 32) -> Path:
    """Write tables in the layout of ultrachat_200k, with multi-turn conversations, and ultrafeedback_binarized."""
    draw = random.Random(0)

    def turns(count: int) -> list[dict]:
        roles = ("user", "assistant")
        return [{"role": roles[i % 2], "content": _text(draw, 4, 20)} for i in range(count)]

    def conversation(number: int) -> dict:
        messages = turns(2 * draw.randint(1, 3))
        return {"prompt": messages[0]["content"], "prompt_id": str(number), "messages": messages}

    def pair(number: int) -> dict:
        (question,), answers = turns(1), [{"role": "assistant", "content": _text(draw, 4, 30)} for _ in range(2)]
        row = {"prompt": question["content"], "prompt_id": str(number)}
        chosen, rejected = ([question, answer] for answer in answers)
        row |= {"chosen": chosen, "rejected": rejected, "messages": chosen}
        return row | {"score_chosen": 8.0, "score_rejected": 4.0}

    conversations = {"train_sft": [conversation(i) for i in range(rows)]}
    splits = {"train_prefs": rows, "test_prefs": rows // 2}
    _write(folder / "preference", {name: [pair(i) for i in range(n)] for name, n in splits.items()})
    _write(folder / "sft", conversations | {"test_sft": [conversation(i) for i in range(rows // 2)]})
    return folder
