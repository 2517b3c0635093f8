"""Trains the base checkpoint of mini TL;DR and its tokenizer: `python -m benchmarks.mini_base [--out FOLDER]`.

Takes two minutes on one core. The result is shipped in src/data/mini_tldr_base. A model trained from scratch on the
noisy SFT mixture never learns to copy facts, so the base model learns it on near-clean summaries.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src.config.schema import Training
from src.data import mini_tldr
from src.data.rows import Demonstration, text_prompt
from src.data.templates import Template
from src.data.tokenization import tokenize
from src.model.loading import save_checkpoint, set_cpu_threads
from src.model.logprobs import patch_model_
from src.planning.content import ContentPath
from src.planning.identity import DataInputs, ModelInputs, SftInputs
from src.planning.resources import Resources
from src.progress import RunProgress
from src.store.attempt import Attempt
from src.store.lease import Lease
from src.store.store import METRICS_FILE
from src.training.loop import sft_loss, train

FOLDER = Path(mini_tldr.__file__).parent / "mini_tldr_base"
VOCAB_SIZE = 800
NUM_EXAMPLES = 64_000  # one epoch of 1000 steps
QUALITY = 0.97  # of the summaries, in [0, 1]
RESOURCES = Resources(cpu_threads=1, max_tokens_per_micro_batch=8192, checkpoint_minutes=10**6)
TRAINER = Training(
    lr=4e-3,
    epochs=1.0,
    max_steps=None,
    batch_size=64,
    lr_scheduler_type="cosine",
    warmup_ratio=0.05,
    adam_betas=(0.9, 0.98),
    weight_decay=0.01,
    max_grad_norm=1.0,
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer on text of the task."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"{post.text} {summary}" for post, summary in mini_tldr.demonstrations(1500, seed=99)]
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCAB_SIZE, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(vocab_size: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocab_size,
            hidden_size=96,
            num_hidden_layers=2,
            num_attention_heads=6,
            num_key_value_heads=3,
            intermediate_size=256,
            max_position_embeddings=256,
            tie_word_embeddings=True,
            pad_token_id=0,
            bos_token_id=1,
            eos_token_id=2,
        )
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=FOLDER)
    out: Path = parser.parse_args().out
    set_cpu_threads(RESOURCES.cpu_threads)
    template = Template("plain", make_tokenizer())
    model = patch_model_(make_model(len(template.tokenizer)))
    rows = mini_tldr.demonstrations(NUM_EXAMPLES, seed=98, quality=QUALITY)
    demonstrations = [Demonstration(text_prompt(post.text), summary) for post, summary in rows]
    data = tokenize(demonstrations, template, 160, 112)
    base = ModelInputs(ContentPath("mini-base", "mini-base"), "plain", "fp32")
    inputs = SftInputs(base, None, DataInputs("mini_tldr", 98, 160, 112), TRAINER, seed=0)
    with tempfile.TemporaryDirectory() as work, Lease(Path(work)) as lease, RunProgress() as report:
        attempt = Attempt(Path(work), Path(work), lease, report, "mini base", "mini-base", Path(work))
        model, _ = train(lambda: model, data.examples, sft_loss, inputs, RESOURCES, attempt)
        print((Path(work) / METRICS_FILE).read_text(encoding="utf-8").splitlines()[-1])
    save_checkpoint(model, template, out)


if __name__ == "__main__":
    main()
