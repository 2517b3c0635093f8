"""The project's own training for a given model and pairs: gradients of one step, or steps of the loop."""

from __future__ import annotations

import json
import random
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import Any

import torch
from hydra import compose, initialize_config_dir
from torch import Tensor
from torch.distributed.tensor import DTensor

from src.config.hydra_setup import register
from src.config.schema import CONF_DIR
from src.config.validation import build_point
from src.data.examples import Example
from src.model.loading import device_of, numerics_of
from src.model.logprobs import iter_logps
from src.model.packing import pack
from src.planning.stage import Stage, stages_of
from src.stages.align import make_loss_fn
from src.store.attempt import Attempt
from src.store.lease import Lease
from src.store.store import METRICS_FILE
from src.training.batches import GlobalBatch
from src.training.loop import train
from src.training.strategies import make_engine


def stage_of(kind: str, *overrides: str) -> Stage:
    """Return the stage of this kind of the point that a command line with these overrides composes."""
    register()
    with initialize_config_dir(str(CONF_DIR), version_base="1.3"):
        point = build_point(compose("train", overrides=list(overrides)))
    return next(stage for stage in stages_of(point) if stage.kind == kind)


def reference_logps(model: Any, examples: Sequence[Example], stage: Stage, noise: float = 0.0) -> Tensor:
    """Return (pairs, 2) log-probs under the model, each moved by a random number of this standard deviation."""
    numerics = numerics_of(stage.inputs.model, stage.resources)
    references, rng = torch.zeros(len(examples), 2), random.Random(0)
    for indices, logps, _ in iter_logps(model, examples, None, numerics):
        references[indices] = logps.float().view(-1, 2)
    return references + torch.tensor([[rng.gauss(0, noise), rng.gauss(0, noise)] for _ in examples])


def engine_gradients(
    model: Any, examples: Sequence[Example], stage: Stage, references: Tensor, after_setup: Any = None
) -> dict[str, Tensor]:
    """Return the gradients of one step on all examples at once, as the engine of the stage computes them, by parameter.

    model: as transformers builds it; the engine takes it over. after_setup: called with the policy before the step.
    """
    inputs, resources = stage.inputs, stage.resources
    with closing(make_engine(resources, inputs.trainer, inputs.lora, inputs.seed)) as engine:
        policy = engine.prepare(lambda: model, numerics_of(inputs.model, resources))
        if after_setup is not None:
            after_setup(policy)
        packed = pack(examples, range(len(examples))).to(engine.device)
        batch = GlobalBatch(len(examples), sum(example.num_supervised_tokens for example in examples))
        loss_fn = make_loss_fn(inputs, references.to(engine.device))
        with engine.micro_step(last=True):
            logps, token_counts = policy(packed)
            engine.backward(loss_fn(packed, logps, token_counts, batch)[0])
        return {name: whole(p.grad).double() for name, p in policy.named_parameters() if p.grad is not None}


def whole(tensor: Tensor) -> Tensor:
    """Return a gradient that is sharded over ranks as one tensor."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


def train_steps(
    model: Any, examples: Sequence[Example], stage: Stage, references: Tensor, folder: Path
) -> tuple[Any, list[dict[str, float]]]:
    """Train on the pairs as the align stage does; return the trained model and the lines of its metrics.jsonl.

    model: as transformers builds it; the engine takes it over.
    """
    checkpoints = folder / "checkpoints"
    checkpoints.mkdir(parents=True)
    inputs, resources = stage.inputs, stage.resources
    loss_fn = make_loss_fn(inputs, references.to(device_of(resources.device)))
    with Lease(folder) as lease:
        attempt = Attempt(folder, checkpoints, lease, lambda *_: None, "gpu_check", "gpu_check", folder)
        trained, _ = train(lambda: model, examples, loss_fn, inputs, resources, attempt)
    lines = (folder / METRICS_FILE).read_text(encoding="utf-8").splitlines()
    return trained, [json.loads(line) for line in lines]
