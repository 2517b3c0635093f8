"""The losses of TRL's DPOTrainer, step for step."""

import json

import pytest
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.trl_side import trl_trainer
from src.data.tokenization import load_examples
from src.model.loading import load_template
from src.planning.stage import stages_of
from src.store.attempt import Attempt
from src.training.batches import batch_indices
from tests.support.commands import SMALL, train
from tests.support.configs import point

pytestmark = pytest.mark.slow

STEPS = 50
POINT = [
    *SMALL,
    "method=dpo",
    "beta=0.1",
    "lr=3e-4",
    "trainer.align.lr_scheduler_type=linear",
    "trainer.align.warmup_ratio=0",  # the learning rate of TRL's first warm-up step is 0
    "trainer.align.max_grad_norm=2",
    "trainer.align.epochs=7",
    f"trainer.align.max_steps={STEPS}",
]


def test_fifty_steps_have_the_losses_of_trl(tmp_path):
    train(*POINT, f"output_dir={tmp_path}")
    (log,) = (tmp_path / "store").glob("align/*/metrics.jsonl")
    ours = [json.loads(line)["loss"] for line in log.read_text().splitlines()]

    (sft,) = (path.parent for path in (tmp_path / "store").glob("sft/*/DONE"))
    (file,) = (tmp_path / "store").glob("reference/*/reference.safetensors")
    inputs = next(stage.inputs for stage in stages_of(point(*POINT)) if stage.kind == "align")
    attempt = Attempt(tmp_path, tmp_path, None, lambda *_: None, "trl", "trl", tmp_path)
    template = load_template(inputs.model)
    examples = load_examples(inputs.data, inputs.model, "train", template, attempt, {}).examples
    size = inputs.trainer.batch_size
    order = [i for step in range(STEPS) for i in batch_indices(step, len(examples), size, inputs.seed)]
    losses = []
    references = load_file(file)["train"][order].tolist()
    job = {"micro_batch": size, "pairs": size, "references": references}
    model, tokenizer = AutoModelForCausalLM.from_pretrained(sft), AutoTokenizer.from_pretrained(sft)
    trainer = trl_trainer(job, model, tokenizer, [examples[i] for i in order], STEPS, learning_rate=3e-4)
    compute = trainer.compute_loss
    trainer.compute_loss = lambda *a, **k: losses.append(loss := compute(*a, **k)) or loss
    trainer.train()

    theirs = [loss.item() for loss in losses]
    assert len(ours) == len(theirs) == STEPS and ours[0] == pytest.approx(0.693147, abs=1e-5)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-4
    # The negative control: losses change, and those of the next step differ.
    assert ours[-1] < 0.6 and max(abs(a - b) for a, b in zip(ours[1:], theirs, strict=False)) > 1e-2
