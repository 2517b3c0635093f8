"""Supervised fine-tuning: token-mean cross-entropy over response tokens -> a checkpoint every method starts from."""

from __future__ import annotations

from functools import partial
from pathlib import Path
from typing import Any

from src.data.held_out import check_held_out, warn_of_leaks
from src.data.templates import Template
from src.data.tokenization import TokenizedDataset, load_examples
from src.model.loading import load_template, load_weights, numerics_of, save_checkpoint
from src.model.logprobs import iter_logps
from src.planning.identity import SftInputs
from src.planning.resources import Resources
from src.stages import validation
from src.stages.shared_rows import Row, SharedRows
from src.store.attempt import Attempt
from src.store.files import write_json, write_jsonl
from src.store.store import COUNTS_FILE, VALIDATION_FILE
from src.training.loop import log_metrics, sft_loss, train
from src.training.lr_schedule import total_steps


def run(inputs: SftInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    data = load_examples(inputs.data, inputs.model, "sft", template, attempt, resources.expected_rows)
    held_out = _held_out(inputs, resources, template, data, attempt)
    if resources.pairs is not None:
        # Validate the preference pairs now rather than after hours of SFT.
        pairs = load_examples(resources.pairs, inputs.model, "validation", template, attempt, resources.expected_rows)
        # Leaks are not in data.json: the model does not depend on the pairs, and other pairs may use it.
        check_held_out(
            resources.pairs, data.examples, pairs.examples, resources.min_validation_prompts, "SFT demonstrations"
        )
    load = partial(load_weights, inputs.model, resources)
    trained = train(load, data.examples, sft_loss, inputs, resources, attempt)
    if attempt.is_main_process:
        with attempt.alone():
            save_checkpoint(trained.model, template, attempt.out)
        counts = {"dropped": data.counts.dropped, "spelling_control_tokens": data.counts.spelling_control_tokens}
        write_json(attempt.out / COUNTS_FILE, {"rows": len(data.examples), **counts})
    if held_out is None:
        return
    model = validation.published_model(trained, inputs, resources, None, attempt)
    lines = _validate(inputs, resources, model, held_out, attempt)
    if not attempt.is_main_process:
        return
    write_jsonl(attempt.out / VALIDATION_FILE, lines)
    attempt.validation_tokens = sum(example.length for example in held_out.examples)
    attempt.tokens += attempt.validation_tokens
    loss = -sum(line["logp"] for line in lines) / sum(line["tokens"] for line in lines)
    log_metrics(attempt, total_steps(len(data.examples), inputs.trainer), {"eval_loss": loss})


def _held_out(
    inputs: SftInputs, resources: Resources, template: Template, data: TokenizedDataset, attempt: Attempt
) -> TokenizedDataset | None:
    """Return the demonstrations to validate on, and warn of those that are trained on; None where there are none."""
    if inputs.data.sft_validation_size == 0:
        return None
    held_out = load_examples(inputs.data, inputs.model, "sft_validation", template, attempt, resources.expected_rows)
    warn_of_leaks(inputs.data, data.examples, held_out.examples, "SFT demonstrations")
    return held_out


def _validate(
    inputs: SftInputs, resources: Resources, model: Any, data: TokenizedDataset, attempt: Attempt
) -> list[Row]:
    """Return one line per held-out demonstration: log-prob of its answers (nats, summed), their tokens, its table."""
    sources: list[Row] = [{"source": example.source} if example.source else {} for example in data.examples]
    numerics, budget = numerics_of(inputs.model, resources), resources.max_tokens_per_micro_batch
    # In memory alone: the model of the next attempt need not have the same bits, as its last steps are trained again.
    rows = SharedRows(attempt, None, attempt.part("validation", len(data.examples)))
    for indices, logps, tokens in iter_logps(model, data.examples, budget, numerics, rows.share):
        columns = zip(indices, logps.tolist(), map(int, tokens.tolist()), strict=True)
        rows.save({i: sources[i] | {"logp": logp, "tokens": n} for i, logp, n in columns})
    lines = rows.gather()
    return [lines[i] for i in sorted(lines)]
