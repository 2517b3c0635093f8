"""Remake the base checkpoint of mini TL;DR, tokenizer included: `python -m src.data.mini_base [--out FOLDER]`.

About two minutes on one core. The result is shipped in src/data/mini_tldr_base; a model trained on the noisy
SFT mixture from scratch never learns to copy facts, so the base learns it on near-clean summaries.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from src.config import Engine, Point, SftOptimisation, Trainer
from src.data import mini_tldr
from src.data.rows import Demonstration, text_prompt
from src.data.templates import Template
from src.data.tokenised import tokenise_demonstrations
from src.engine import TrainingEngine
from src.lease import Lease
from src.logprobs import prepare
from src.models import save_checkpoint, use_threads
from src.progress import RunProgress
from src.stages.sft import token_mean_loss
from src.store import Attempt
from src.tracking import Tracker
from src.training import train

FOLDER = Path(__file__).parent / "mini_tldr_base"
VOCABULARY = 800
EXAMPLES = 64_000  # one pass, 1000 steps
QUALITY = 0.97  # of the summaries: near clean
POINT = Point(
    engine=Engine(name="single", threads=1),
    trainer=Trainer(
        sft=SftOptimisation(
            lr=4e-3,
            batch_size=64,
            schedule="cosine",
            warmup_ratio=0.05,
            adam_betas=(0.9, 0.98),
            weight_decay=0.01,
            max_grad_norm=1.0,
        ),
        tokens_per_batch=8192,
        checkpoint_steps=10**6,
    ),
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE over the task's own text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    corpus = [f"{post.text} {summary}" for post, summary in mini_tldr.demonstrations(1500, seed=99)]
    special = ["<pad>", "<s>", "</s>"]
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        corpus,
        trainers.BpeTrainer(
            vocab_size=VOCABULARY, special_tokens=special, initial_alphabet=alphabet, show_progress=False
        ),
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>")


def make_model(vocabulary: int) -> LlamaForCausalLM:
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=vocabulary,
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
    use_threads(POINT.engine)
    template = Template("plain", make_tokenizer())
    model = prepare(make_model(len(template.tokenizer)))
    rows = mini_tldr.demonstrations(EXAMPLES, seed=98, quality=QUALITY)
    examples = [Demonstration(text_prompt(post.text), summary) for post, summary in rows]
    data = tokenise_demonstrations(examples, template, 160, 112)
    with tempfile.TemporaryDirectory() as work, Lease(Path(work)) as lease, RunProgress() as report:
        attempt = Attempt(Path(work), Path(work), lease, report, "mini base", "mini-base", Path(work))
        with TrainingEngine(POINT, POINT.trainer.sft) as engine, Tracker(attempt) as tracker:
            train(engine, engine.take(model), data.examples, token_mean_loss, POINT, "sft", attempt, tracker)
        print((Path(work) / "metrics.jsonl").read_text().splitlines()[-1])
    save_checkpoint(model, template, out)


if __name__ == "__main__":
    main()
