"""Log-probs of all preference pairs under the checkpoint alignment starts from: once for every method, beta and lr."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from src.data.examples import Example
from src.data.tokenization import load_examples
from src.errors import StageError
from src.model.loading import load_for_inference, load_template, numerics_of
from src.model.logprobs import iter_logps
from src.planning.identity import ReferenceInputs
from src.planning.resources import Resources
from src.stages.pairs import digest_of_pairs, training_examples
from src.stages.shared_rows import SharedRows
from src.store.attempt import Attempt

FILE = "reference.safetensors"


def read(folder: Path) -> dict[str, Tensor]:
    """Read `train` and `validation`: (pairs, 2) float32, summed log-probs of chosen and rejected in nats."""
    return load_file(folder / FILE)


def check_pairs(upstream: dict[str, Path]) -> None:
    """Raise StageError when the log-probs upstream are of other training pairs than those upstream.

    That is so where pairs were lost and made again on a GPU, whose samples need not be the same.
    """
    with safe_open(upstream["reference"] / FILE, "pt") as file:
        scored = (file.metadata() or {}).get("pairs")
    if scored != digest_of_pairs(upstream):
        raise StageError(
            f"{upstream['reference']}: log-probs of other pairs than those in {upstream['pairs']}, which were made "
            "again; delete the former and run the same command again"
        )


def run(inputs: ReferenceInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    model = load_for_inference(inputs.model, resources, upstream.get("init"))
    training = training_examples(inputs, template, resources, upstream, attempt)
    validation = load_examples(inputs.data, inputs.model, "validation", template, attempt, resources.expected_rows)
    splits = {"train": training.examples, "validation": validation.examples}
    total, finished = sum(map(len, splits.values())), 0
    tensors: dict[str, Tensor] = {}
    for split, examples in splits.items():
        report = partial(_report, attempt, finished, total)
        tensors[split] = _logps(inputs, resources, model, examples, SharedRows(attempt, f"logps-{split}", report))
        finished += len(examples)
        attempt.tokens += sum(example.length for example in examples)
    if attempt.is_main_process:
        made = digest_of_pairs(upstream)
        save_file(tensors, attempt.out / FILE, None if made is None else {"pairs": made})


def _report(attempt: Attempt, before: int, total: int, num_done: int) -> None:
    attempt.step(before + num_done, total)


def _logps(
    inputs: ReferenceInputs, resources: Resources, model: Any, examples: Sequence[Example], rows: SharedRows
) -> Tensor:
    """Return (examples, 2) float32, on every rank."""
    numerics, budget = numerics_of(inputs.model, resources), resources.max_tokens_per_micro_batch
    for indices, logps, _ in iter_logps(model, examples, budget, numerics, rows.share):
        rows.save({i: {"logps": pair} for i, pair in zip(indices, logps.view(-1, 2).tolist(), strict=True)})
    known = rows.gather()
    return torch.tensor([known[i]["logps"] for i in range(len(examples))])
