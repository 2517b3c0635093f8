"""Supervised fine-tuning: token-mean cross-entropy over response tokens -> a checkpoint every method starts from."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import Point
from src.data.tokenised import examples_of
from src.engine import TrainingEngine
from src.models import load_base, save_checkpoint, template_of
from src.store import Attempt, write_json
from src.tracking import Tracker
from src.training import StepSize, train

if TYPE_CHECKING:
    from torch import Tensor

    from src.pairs import PackedBatch


def token_mean_loss(
    batch: PackedBatch, logps: Tensor, tokens: Tensor, step: StepSize
) -> tuple[Tensor, dict[str, Tensor]]:
    """Every response token of the optimiser step weighs the same, whichever micro-batch it is in."""
    return -logps.sum() / step.response_tokens, {"response_tokens": tokens.sum()}


def run(point: Point, fields: dict[str, Any], upstream: dict[str, Path], attempt: Attempt) -> None:
    template = template_of(point)
    data = examples_of(point, "sft", template, attempt)
    examples_of(
        point, "validation", template, attempt
    )  # the pairs come later: what is wrong with them shows now, not then
    with TrainingEngine(point, point.trainer.sft) as engine, Tracker(attempt) as tracker:
        model = engine.take(load_base(point))
        train(engine, model, data.examples, token_mean_loss, point, "sft", attempt, tracker)
        model = engine.whole(model)
    if not attempt.leads:
        return
    save_checkpoint(model, template, attempt.out)
    write_json(attempt.out / "data.json", {"rows": len(data.examples), "dropped": data.dropped})
