"""Supervised fine-tuning: token-mean cross-entropy over response tokens -> a checkpoint every method starts from."""

from __future__ import annotations

from functools import partial
from pathlib import Path

from src.data.held_out import check_held_out
from src.data.tokenization import load_examples
from src.model.loading import load_template, load_weights, save_checkpoint
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
        validation = load_examples(
            resources.pairs, inputs.model, "validation", template, attempt, resources.expected_rows
        )
        # Leaks are not in data.json: the model does not depend on the pairs, and other pairs may use it.
        check_held_out(
            resources.pairs, data.examples, validation.examples, resources.min_validation_prompts, "SFT demonstrations"
        )
    load = partial(load_weights, inputs.model, resources)
    model, _ = train(load, data.examples, sft_loss, inputs, resources, attempt)
    if attempt.is_main_process:
        with attempt.alone():
            save_checkpoint(model, template, attempt.out)
        counts = {"dropped": data.counts.dropped, "spelling_control_tokens": data.counts.spelling_control_tokens}
        write_json(attempt.out / "data.json", {"rows": len(data.examples), **counts})
