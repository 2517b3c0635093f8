"""Against TRL's DPOTrainer: the same losses, step for step."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.trl_side import trl_trainer
from src.config.validation import build_point
from src.data.tokenization import examples_of
from src.model.loading import template_of
from src.training.loop import batch_indices
from tests.support.commands import SMALL, train
from tests.support.configs import composed

STEPS = 50
POINT = [
    *SMALL,
    "method=dpo",
    "beta=0.1",
    "lr=3e-4",
    "trainer.align.schedule=linear",
    "trainer.align.warmup_ratio=0",  # TRL's first step of a warm-up has a rate of 0
    "trainer.align.max_grad_norm=2",
    "trainer.align.epochs=7",
    f"trainer.align.max_steps={STEPS}",
]


def test_fifty_steps_have_the_losses_that_trl_has(tmp_path):
    train(*POINT, f"output_dir={tmp_path}")
    (log,) = (tmp_path / "store").glob("align/*/metrics.jsonl")
    ours = [json.loads(line)["loss"] for line in log.read_text().splitlines()]

    (sft,) = (path.parent for path in (tmp_path / "store").glob("sft/*/DONE"))
    (file,) = (tmp_path / "store").glob("reference/*/reference.safetensors")
    point = build_point(composed(*POINT))
    examples = examples_of(point, "train", template_of(point)).examples
    size = point.trainer.align.batch_size
    order = [i for step in range(STEPS) for i in batch_indices(step, len(examples), size, point.seed)]
    losses = []
    job = {"micro_batch": size, "pairs": size, "references": load_file(file)["train"][order].tolist()}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft), AutoTokenizer.from_pretrained(sft)
    trainer = trl_trainer(job, model, tokenizer, [examples[i] for i in order], STEPS, learning_rate=3e-4)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: losses.append(loss := compute(*a, **k)) or loss
    trainer.train()

    theirs = [loss.item() for loss in losses]
    assert len(ours) == len(theirs) == STEPS and ours[0] == pytest.approx(0.693147, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    # The control: the curve goes somewhere, and a step too late it would not be the same.
    assert ours[-1] < 0.6 and max(abs(a - b) for a, b in zip(ours[1:], theirs, strict=False)) > 1e-2
