"""Supervised fine-tuning: token-mean cross-entropy over response tokens -> a checkpoint every method starts from."""

from __future__ import annotations

from pathlib import Path

from src.data.tokenization import load_examples
from src.model.loading import load_model, load_template, save_checkpoint
from src.planning.identity import SftInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt
from src.store.files import write_json
from src.training.loop import sft_loss, train


def run(inputs: SftInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    data = load_examples(inputs.data, inputs.model, "sft", template, attempt, resources.expected_rows)
    if resources.pairs is not None:
        # Validate the preference pairs now rather than after hours of SFT.
        load_examples(resources.pairs, inputs.model, "validation", template, attempt, resources.expected_rows)
    model = train(load_model(inputs.model, resources), data.examples, sft_loss, inputs, resources, attempt)
    if attempt.is_main_process:
        save_checkpoint(model, template, attempt.out)
        write_json(attempt.out / "data.json", {"rows": len(data.examples), "dropped": data.dropped})
