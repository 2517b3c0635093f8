"""Alignment: minimizes the method's loss on preference pairs -> a checkpoint, its metrics, and validation scores."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from src.data.held_out import check_held_out
from src.data.templates import Template
from src.data.tokenization import TokenizedDataset, load_examples
from src.losses import PairLoss, preference_loss
from src.methods import SCORES
from src.model.adapters import save_adapter
from src.model.loading import device_of, load_template, load_weights, numerics_of, save_checkpoint
from src.model.logprobs import iter_logps
from src.model.packing import PackedBatch
from src.planning.content import locate
from src.planning.identity import AlignInputs
from src.planning.resources import Resources
from src.scores import sequence_score
from src.stages import reference
from src.stages.pairs import training_examples
from src.stages.shared_rows import Row, SharedRows
from src.stages.validation import published_model
from src.store.attempt import Attempt
from src.store.files import write_json, write_jsonl
from src.store.store import COUNTS_FILE, VALIDATION_FILE
from src.training.loop import GlobalBatch, LossFn, Trained, train

ROUNDING_ULPS = 8  # units in the last place of the summed log-probs; differences of training are thousands of them


def pair_losses(
    inputs: AlignInputs, logps: Tensor, tokens: Tensor, references: Tensor | None, indices: Sequence[int] | Tensor
) -> PairLoss:
    """Return the losses of the pairs `indices`, whose sequences are chosen, rejected, chosen, rejected, ...

    references: (all pairs, 2) log-probs of chosen and rejected; None for a score without reference. All tensors are on
    one device.
    """
    reference_logps = None if references is None else references[indices]
    pairs = logps.view(-1, 2), tokens.view(-1, 2), reference_logps
    weights: dict[str, Any] = {"sft_weight": inputs.sft_weight, "align_weight": inputs.align_weight}
    return preference_loss(inputs.method, inputs.beta, *pairs, score=inputs.score, options=inputs.options, **weights)


def score_rounding(
    inputs: AlignInputs, logps: Tensor, tokens: Tensor, references: Tensor | None, indices: Sequence[int]
) -> Tensor:
    """Return the difference of scores below which rounding decides, (pairs,) float32, in nats, without beta.

    A log-prob is a sum of float32 numbers, and off by a few units in its last place; which batch its sequence was in
    is enough for that. A policy that has not moved has differences of up to ROUNDING_ULPS / 8 of them. A score is off
    by as much times its derivative by the log-prob.
    """
    logps, tokens = logps.detach().view(-1, 2).requires_grad_(), tokens.view(-1, 2)
    reference_logps = None if references is None else references[indices]
    options = {name: inputs.options[name] for name in SCORES[inputs.score].options}
    with torch.enable_grad():
        scores = sequence_score(inputs.score, logps, tokens, reference_logps, **options)
    (slopes,) = torch.autograd.grad(scores.sum(), logps)
    size = logps.detach().abs() if reference_logps is None else logps.detach().abs() + reference_logps.abs()
    return ROUNDING_ULPS * torch.finfo(torch.float32).eps * (size * slopes).sum(1)


def make_loss_fn(inputs: AlignInputs, references: Tensor | None) -> LossFn:
    """Return the mean of the method's loss over the pairs of a step, with TRL's metrics.

    A reward is beta times the score that the method compares, in nats: for log-ratios TRL's beta * log-ratio.
    references: as in `pair_losses`, on the device of the log-probs.
    """

    def loss_fn(
        packed: PackedBatch, logps: Tensor, token_counts: Tensor, batch: GlobalBatch
    ) -> tuple[Tensor, dict[str, Tensor]]:
        pairs = pair_losses(inputs, logps, token_counts, references, packed.example_indices)
        chosen_rewards = inputs.beta * pairs.chosen_score.detach()
        rejected_rewards = inputs.beta * pairs.rejected_score.detach()
        chosen_logps, rejected_logps = logps.detach().view(-1, 2).unbind(1)
        return pairs.loss.sum() / batch.num_examples, {
            "rewards/chosen": chosen_rewards.sum(),
            "rewards/rejected": rejected_rewards.sum(),
            "rewards/accuracies": (chosen_rewards > rejected_rewards).float().sum(),
            "rewards/margins": (chosen_rewards - rejected_rewards).sum(),
            "logps/chosen": chosen_logps.sum(),
            "logps/rejected": rejected_logps.sum(),
        }

    return loss_fn


def run(inputs: AlignInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    data = training_examples(inputs, template, resources, upstream, attempt)
    held_out = load_examples(inputs.data, inputs.model, "validation", template, attempt, resources.expected_rows)
    leaks = check_held_out(
        inputs.data, data.examples, held_out.examples, resources.min_validation_prompts, "training pairs"
    )
    references = reference.read(upstream["reference"]) if SCORES[inputs.score].needs_reference else {}
    if references:
        reference.check_pairs(upstream)
    # On the device from the start: a copy for every micro-batch would wait for the kernels before it.
    train_references = references["train"].to(device_of(resources.device)) if references else None
    loss_fn = make_loss_fn(inputs, train_references)
    load = partial(load_weights, inputs.model, resources, upstream.get("init"))
    trained = train(load, data.examples, loss_fn, inputs, resources, attempt)
    if attempt.is_main_process:
        with attempt.alone():
            _publish(inputs, template, upstream, trained, attempt)
    model = published_model(trained, inputs, resources, upstream.get("init"), attempt)
    lines = _validate(inputs, resources, model, held_out, references.get("validation"), attempt)
    if not attempt.is_main_process:
        return
    write_jsonl(attempt.out / VALIDATION_FILE, lines)
    attempt.validation_tokens = sum(example.length for example in held_out.examples)
    attempt.tokens += attempt.validation_tokens
    counts = {"train": data.counts, "validation": held_out.counts}
    content = {
        "pairs": len(data.examples),
        "dropped": {split: c.dropped for split, c in counts.items()},
        "spelling_control_tokens": {split: c.spelling_control_tokens for split, c in counts.items()},
        "validation_leaks": leaks._asdict(),
    }
    write_json(attempt.out / COUNTS_FILE, content)


def _publish(
    inputs: AlignInputs, template: Template, upstream: dict[str, Path], trained: Trained, attempt: Attempt
) -> None:
    dtype = getattr(torch, inputs.save_dtype)
    if trained.adapter is None:
        save_checkpoint(trained.model, template, attempt.out, dtype)
    else:
        initial = upstream.get("init") or locate(inputs.model.path.location) or inputs.model.path.location
        save_adapter(trained.adapter, str(initial), attempt.out, dtype)


def _validate(
    inputs: AlignInputs,
    resources: Resources,
    model: Any,
    data: TokenizedDataset,
    references: Tensor | None,
    attempt: Attempt,
) -> list[Row]:
    """Return one line per validation pair: prompt, loss, reward margin, and whether the score prefers the chosen one.

    Also the log-probs of chosen and rejected response, nats, `logps` and, where the score has a reference,
    `reference_logps`; of a mixture also the table. Prompts are numbered by first appearance, so that pairs of one
    prompt have the same number. Equal scores are half a point: which of the two is higher then says nothing.
    """
    sources: list[Row] = [{"source": example.source} if example.source else {} for example in data.examples]
    numbers: dict[tuple[int, ...], int] = {}
    prompts = [numbers.setdefault(example.prompt, len(numbers)) for example in data.examples]
    numerics, budget = numerics_of(inputs.model, resources), resources.max_tokens_per_micro_batch
    # In memory alone: the model of the next attempt need not have the same bits, as its last steps are trained again.
    rows = SharedRows(attempt, None, attempt.part("validation", len(data.examples)))
    for indices, logps, tokens in iter_logps(model, data.examples, budget, numerics, rows.share):
        pairs = pair_losses(inputs, logps, tokens, references, indices)
        margins = inputs.beta * (pairs.chosen_score - pairs.rejected_score)
        ties = margins.abs() <= inputs.beta * score_rounding(inputs, logps, tokens, references, indices)
        correct = torch.where(ties, 0.5, (margins > 0).float())
        columns = {
            "loss": pairs.loss.tolist(),
            "margin": margins.tolist(),
            "correct": correct.tolist(),
            "logps": logps.view(-1, 2).tolist(),
        }
        if references is not None:
            columns["reference_logps"] = references[indices].tolist()
        rows.save(
            {
                index: sources[index] | {"prompt": prompts[index]} | {name: of[i] for name, of in columns.items()}
                for i, index in enumerate(indices)
            }
        )
    lines = rows.gather()
    return [lines[i] for i in sorted(lines)]
