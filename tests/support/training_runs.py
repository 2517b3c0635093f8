"""Short trainings of a model of SmolLM2's architecture by any engine, on one or several gloo ranks."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import closing
from typing import Any, NamedTuple

import pytest
import torch
from torch import Tensor

from src.config.schema import Lora, Training
from src.distributed import get_distributed
from src.model.numerics import NumericsConfig
from src.model.packing import pack
from src.planning.resources import KeptWhole, Resources
from src.training import fsdp_engine
from src.training.engine import TrainingEngine
from src.training.strategies import make_engine
from tests.support.ranks import on_ranks
from tests.support.small_models import make_model, random_pairs

# That of SmolLM2-135M, an eighth as wide and a fifth as deep.
SMOLLM2 = {
    "hidden_size": 72,
    "intermediate_size": 192,
    "num_hidden_layers": 6,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "initializer_range": 0.05,
}
MICRO_BATCHES = 3
BOTH, WEIGHTS, NEITHER = KeptWhole(True, True), KeptWhole(True, False), KeptWhole(False, False)


class Trained(NamedTuple):
    """Gradient norms of the steps, and the weights, None where the engine returns no model."""

    norms: list[float]
    weights: dict[str, Tensor] | None


def start() -> Any:
    """Return the model that trainings start from."""
    return make_model(patched=False, **SMOLLM2)


def step(engine: TrainingEngine, number: int) -> float:
    """Take an optimizer step on 12 pairs, in three micro-batches a rank; return the gradient norm."""
    ranks, pairs = get_distributed(), random_pairs(12, number)
    for k in range(MICRO_BATCHES):
        part = pairs[ranks.rank :: ranks.size][k::MICRO_BATCHES]
        with engine.micro_step(last=k == MICRO_BATCHES - 1):
            logps, _ = engine.policy(pack(part, range(len(part))))
            engine.backward(-logps.sum() / 200)
    return float(engine.step())


def run(
    strategy: str,
    precision: str = "fp32",
    *,
    num_steps: int = 4,
    lr: float = 1e-3,
    keeps: KeptWhole = BOTH,
    lora: Lora | None = None,
    before_step: Callable[[TrainingEngine, int], None] = lambda *_: None,
    **resources: Any,
) -> Trained:
    """Train on this rank."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(fsdp_engine, "fsdp_keeps_whole", lambda *_: keeps)
        trainer = Training(lr=lr, max_grad_norm=1.0)
        with closing(make_engine(Resources(device="cpu", strategy=strategy, **resources), trainer, lora, 0)) as engine:
            engine.prepare(start, NumericsConfig(precision))
            norms = []
            for number in range(num_steps):
                before_step(engine, number)
                norms.append(step(engine, number))
            model = engine.gather_model()
    return Trained(norms, None if model is None else {n: p.detach().clone() for n, p in model.named_parameters()})


def run_alone(strategy: str, *arguments: Any, **options: Any) -> Trained:
    """Train with one process, a forked one: ranks that are forked from a process that has trained may wait for ever."""
    return on_ranks(1, strategy, lambda: run(strategy, *arguments, **options))[0]


def run_on_two(strategy: str, *arguments: Any, **options: Any) -> list[Trained]:
    return on_ranks(2, strategy, lambda: run(strategy, *arguments, **options))


def moved(weights: dict[str, Tensor], before: dict[str, Tensor] | None = None) -> Tensor:
    """Return how far the weights are from where they started, as one float64 vector."""
    before = before or dict(start().named_parameters())
    return torch.cat([(weights[name] - before[name]).detach().flatten().double() for name in sorted(before)])


def error(weights: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """Return the distance of two trained models, relative to how far the expected one has moved."""
    return float((moved(weights) - moved(expected)).norm() / moved(expected).norm())
