"""Alignment: minimizes the method's loss on preference pairs -> a checkpoint, its metrics, and validation scores."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch import Tensor

from src.data.tokenization import TokenizedDataset, load_examples
from src.losses import PairLoss, preference_loss
from src.methods import METHODS
from src.model.loading import load_model, load_template, numerics_of, save_checkpoint
from src.model.logprobs import iter_logps
from src.model.packing import PackedBatch
from src.planning.identity import AlignInputs
from src.planning.resources import Resources
from src.stages import reference
from src.store.attempt import Attempt
from src.store.files import write_json, write_jsonl
from src.training.loop import GlobalBatch, LossFn, train

VALIDATION_FILE = "validation.jsonl"


def pair_losses(
    inputs: AlignInputs, logps: Tensor, tokens: Tensor, references: Tensor | None, indices: Sequence[int]
) -> PairLoss:
    """Return the losses of the pairs `indices`, whose sequences are chosen, rejected, chosen, rejected, ...

    references: (all pairs, 2) log-probs of chosen and rejected; None for a method without reference.
    """
    reference_logps = None if references is None else references[list(indices)].to(logps.device)
    pairs = logps.view(-1, 2), tokens.view(-1, 2), reference_logps
    weights: dict[str, Any] = {"sft_weight": inputs.sft_weight, "align_weight": inputs.align_weight}
    return preference_loss(inputs.method, inputs.beta, *pairs, options=inputs.options, **weights)


def make_loss_fn(inputs: AlignInputs, references: Tensor | None) -> LossFn:
    """Return the mean of the method's loss over the pairs of a step, with TRL's metrics.

    A reward is beta times the score that the method compares, in nats: for methods with a reference TRL's
    beta * log-ratio.
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
    data, validation = (
        load_examples(inputs.data, inputs.model, split, template, attempt, resources.expected_rows)
        for split in ("train", "validation")
    )
    references = reference.read(upstream["reference"]) if METHODS[inputs.method].needs_reference else {}
    loss_fn = make_loss_fn(inputs, references.get("train"))
    model = load_model(inputs.model, resources, upstream.get("init"))
    model = train(model, data.examples, loss_fn, inputs, resources, attempt)
    if not attempt.is_main_process:
        return
    _validate(inputs, resources, model, validation, references.get("validation"), attempt)
    save_checkpoint(model, template, attempt.out)
    dropped = {"train": data.dropped, "validation": validation.dropped}
    write_json(attempt.out / "data.json", {"pairs": len(data.examples), "dropped": dropped})


def _validate(
    inputs: AlignInputs,
    resources: Resources,
    model: Any,
    data: TokenizedDataset,
    references: Tensor | None,
    attempt: Attempt,
) -> None:
    """Write one line per validation pair: prompt, loss, reward margin, and whether the score prefers the chosen one.

    Prompts are numbered by first appearance, so that pairs of one prompt have the same number.
    """
    numbers: dict[tuple[int, ...], int] = {}
    prompts = [numbers.setdefault(example.prompt, len(numbers)) for example in data.examples]
    lines: dict[int, dict[str, Any]] = {}
    numerics, budget = numerics_of(inputs.model, resources), resources.max_tokens_per_micro_batch
    for indices, logps, tokens in iter_logps(model, data.examples, budget, numerics):
        pairs = pair_losses(inputs, logps, tokens, references, indices)
        margins = inputs.beta * (pairs.chosen_score - pairs.rejected_score)
        for i, loss, margin in zip(indices, pairs.loss.tolist(), margins.tolist(), strict=True):
            lines[i] = {"prompt": prompts[i], "loss": loss, "margin": margin, "correct": float(margin > 0)}
        attempt.tokens += sum(data.examples[i].length for i in indices)
    write_jsonl(attempt.out / VALIDATION_FILE, (lines[i] for i in sorted(lines)))
