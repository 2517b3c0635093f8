"""What stages that train do after it: score held-out rows by the model as it is published."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.distributed import get_distributed
from src.model.loading import load_for_inference, numerics_of
from src.model.numerics import cast_for_inference_
from src.planning.identity import AlignInputs, SftInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt
from src.training.loop import Trained


def published_model(
    trained: Trained, inputs: SftInputs | AlignInputs, resources: Resources, initial: Path | None, attempt: Attempt
) -> Any:
    """Return the model of a checkpoint that rank 0 has written, to score with. Every rank calls this.

    initial: the checkpoint that training started from; None for the base model.
    """
    get_distributed().barrier()  # until the checkpoint is there, which ranks that trained a shard load
    if trained.model is None:
        return load_for_inference(inputs.model, resources, attempt.out, initial)
    cast_for_inference_(trained.model, numerics_of(inputs.model, resources))
    return trained.model
