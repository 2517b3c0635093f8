"""Log-probs of all preference pairs under the checkpoint alignment starts from: once for every method, beta and lr."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors.torch import load_file, save_file

from src.config import Point
from src.data.tokenised import examples_of
from src.logprobs import score
from src.models import compute_of, load_base, load_checkpoint, template_of
from src.store import Attempt

if TYPE_CHECKING:
    from torch import Tensor

FILE = "reference.safetensors"


def read(folder: Path) -> dict[str, Tensor]:
    """`train` and `validation`: (pairs, 2) float32, summed log-probs of chosen and rejected in nats."""
    return load_file(folder / FILE)


def run(point: Point, fields: dict[str, Any], upstream: dict[str, Path], attempt: Attempt) -> None:
    template = template_of(point)
    model = load_checkpoint(upstream["init"], point) if "init" in upstream else load_base(point)
    parts = {part: examples_of(point, part, template, attempt).examples for part in ("train", "validation")}
    total, finished = sum(map(len, parts.values())), 0
    tensors: dict[str, Tensor] = {}
    for part, examples in parts.items():
        logps = torch.empty(len(examples), 2)
        counts = torch.empty(len(examples), 2)
        for indices, values, tokens in score(model, examples, point.trainer.tokens_per_batch, compute_of(point)):
            logps[indices], counts[indices] = values.view(-1, 2), tokens.view(-1, 2)
            attempt.tokens += sum(examples[i].length for i in indices)
            finished += len(indices)
            attempt.step(finished, total)
        tensors[part], tensors[f"{part}_tokens"] = logps, counts
    save_file(tensors, attempt.out / FILE)
