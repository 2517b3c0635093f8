"""Log-probs of all preference pairs under the checkpoint alignment starts from: once for every method, beta and lr."""

from __future__ import annotations

from pathlib import Path

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.data.tokenization import load_examples
from src.model.loading import load_for_inference, load_template, numerics_of
from src.model.logprobs import iter_logps
from src.planning.identity import ReferenceInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

FILE = "reference.safetensors"


def read(folder: Path) -> dict[str, Tensor]:
    """Read `train` and `validation`: (pairs, 2) float32, summed log-probs of chosen and rejected in nats."""
    return load_file(folder / FILE)


def run(inputs: ReferenceInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    model = load_for_inference(inputs.model, resources, upstream.get("init"))
    numerics, budget = numerics_of(inputs.model, resources), resources.max_tokens_per_micro_batch
    splits = {
        split: load_examples(inputs.data, inputs.model, split, template, attempt, resources.expected_rows).examples
        for split in ("train", "validation")
    }
    total, finished = sum(map(len, splits.values())), 0
    tensors: dict[str, Tensor] = {}
    attempt.step(finished, total)
    for split, examples in splits.items():
        tensors[split] = torch.empty(len(examples), 2)
        for indices, logps, _ in iter_logps(model, examples, budget, numerics):
            tensors[split][indices] = logps.view(-1, 2)
            attempt.tokens += sum(examples[i].length for i in indices)
            finished += len(indices)
            attempt.step(finished, total)
    save_file(tensors, attempt.out / FILE)
