"""Alignment: the chosen method's loss on preference pairs -> a checkpoint, its metrics, and its validation scores."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import Point, method_options
from src.data.tokenised import Tokenised, examples_of
from src.engine import TrainingEngine
from src.logprobs import score
from src.methods import METHODS, PairLoss, preference_loss
from src.models import compute_of, load_base, load_checkpoint, save_checkpoint, template_of
from src.stages import reference
from src.store import Attempt, write_json
from src.tracking import Tracker
from src.training import StepSize, train

if TYPE_CHECKING:
    from torch import Tensor

    from src.pairs import PackedBatch

VALIDATION_FILE = "validation.jsonl"


def pair_losses(point: Point, logps: Tensor, tokens: Tensor, reference_logps: Tensor | None) -> PairLoss:
    """The point's loss for (chosen, rejected, chosen, rejected, ...) sequences; reference_logps: (pairs, 2)."""
    chosen, rejected = logps.view(-1, 2).unbind(1)
    chosen_tokens, rejected_tokens = tokens.view(-1, 2).unbind(1)
    references = () if reference_logps is None else reference_logps.to(logps.device).unbind(1)
    return preference_loss(
        point.method.name,
        point.beta,
        chosen,
        rejected,
        chosen_tokens,
        rejected_tokens,
        *references,
        sft_weight=point.init.sft_weight,
        align_weight=point.init.align_weight,
        options=method_options(point),
    )


def objective_of(point: Point, references: Tensor | None) -> Callable[..., tuple[Tensor, dict[str, Tensor]]]:
    """Mean of the method's loss over the pairs of a step. The margin is beta times the difference of the scores."""

    def objective(
        batch: PackedBatch, logps: Tensor, tokens: Tensor, step: StepSize
    ) -> tuple[Tensor, dict[str, Tensor]]:
        own = None if references is None else references[list(batch.examples)]
        pairs = pair_losses(point, logps, tokens, own)
        margin = (pairs.chosen_score - pairs.rejected_score).detach()
        chosen, rejected = logps.detach().view(-1, 2).unbind(1)
        return pairs.loss.sum() / step.examples, {
            "reward_accuracy": (margin > 0).float().sum(),
            "reward_margin": point.beta * margin.sum(),
            "chosen_logps": chosen.sum(),
            "rejected_logps": rejected.sum(),
        }

    return objective


def run(point: Point, fields: dict[str, Any], upstream: dict[str, Path], attempt: Attempt) -> None:
    template = template_of(point)
    data, validation = (examples_of(point, part, template, attempt) for part in ("train", "validation"))
    references = reference.read(upstream["reference"]) if METHODS[point.method.name].needs_reference else {}
    objective = objective_of(point, references.get("train"))
    with TrainingEngine(point, point.trainer.align) as engine, Tracker(attempt) as tracker:
        model = engine.take(load_checkpoint(upstream["init"], point) if "init" in upstream else load_base(point))
        train(engine, model, data.examples, objective, point, "align", attempt, tracker)
        model = engine.whole(model)
    if not attempt.leads:
        return
    _validate(point, model, validation, references.get("validation"), attempt)
    save_checkpoint(model, template, attempt.out)
    dropped = {"train": data.dropped, "validation": validation.dropped}
    write_json(attempt.out / "data.json", {"pairs": len(data.examples), "dropped": dropped})


def _validate(point: Point, model: Any, data: Tokenised, references: Tensor | None, attempt: Attempt) -> None:
    """One line a validation pair: its prompt (by order of appearance), loss, margin, and whether the method's score
    prefers the chosen response."""
    numbers: dict[tuple[int, ...], int] = {}
    prompts = [numbers.setdefault(example.prompt, len(numbers)) for example in data.examples]
    lines: dict[int, dict[str, Any]] = {}
    scored = score(model, data.examples, point.trainer.tokens_per_batch, compute_of(point))
    for indices, logps, tokens in scored:
        pairs = pair_losses(point, logps, tokens, None if references is None else references[indices])
        margins = point.beta * (pairs.chosen_score - pairs.rejected_score)
        for i, loss, margin in zip(indices, pairs.loss.tolist(), margins.tolist(), strict=True):
            lines[i] = {"prompt": prompts[i], "loss": loss, "margin": margin, "correct": float(margin > 0)}
        attempt.tokens += sum(data.examples[i].length for i in indices)
    text = "".join(json.dumps(lines[i]) + "\n" for i in sorted(lines))
    (attempt.out / VALIDATION_FILE).write_text(text)
