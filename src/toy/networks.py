"""Many tiny networks trained at once, one per seed; seeds are the last axis of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from src.losses import LOSSES

# On a scalar score DPO, SimPO (its margin aside) and ORPO are one objective; ASFT reads the score as log odds.
OBJECTIVES = ("dpo", "ipo", "apo_zero", "nca", "cal_dpo", "asft")
OPTIMIZERS: dict[str, Callable[..., torch.optim.Optimizer]] = {
    "adam": partial(torch.optim.Adam, foreach=False, fused=True),
    "sgd": torch.optim.SGD,
}

_CONSTANT = 1e-6  # a network whose outputs differ by less is dead: it ranks nothing


@dataclass(frozen=True)
class NetworkSettings:
    """The settings of one network; its results depend on these and its seed."""

    objective: str
    width: int
    bias: float
    lr: float
    beta: float
    prompts: int
    train_fraction: float
    epochs: int
    batch_size: int
    optimizer: str


def train(training: NetworkSettings, seeds: range) -> dict[str, NDArray[Any]]:
    """Train and test one network per seed; each seed draws its own data and initial weights.

    Returns (seeds,) arrays: `accuracy`, the fraction of test pairs ranked correctly, ties counting half; `icc`, ICC1
    over the test prompts, NaN for a dead network; `dead`, whether all its scores are equal or one is NaN.
    """
    x, y, weights = _sample_data_and_weights(training, seeds)
    split = round(training.train_fraction * training.prompts)
    optimizer = OPTIMIZERS[training.optimizer]([weights], lr=training.lr)
    loss_fn: Any = LOSSES[training.objective]
    options = {"calibration_weight": 1.0} if training.objective == "cal_dpo" else {}
    loss = partial(loss_fn, beta=training.beta, **options)
    for epoch in range(training.epochs):
        # All seeds share the order: the rows of a seed are independent draws, so any order of them is random.
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(split))
        for batch in order.split(training.batch_size):
            weights.grad = _gradient(weights, x[batch], y[:, batch], loss)
            optimizer.step()
    return _test(_scores(weights, x[split:], y[:, split:])[0])


def _sample_data_and_weights(training: NetworkSettings, seeds: range) -> tuple[Tensor, Tensor, Tensor]:
    """Return x (prompts, seeds), y (2, prompts, seeds; chosen and rejected) and weights (4 width + 1, seeds)."""
    n, h = training.prompts, training.width
    columns = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        prompt, scores = generator.random(n), generator.random((2, n))
        centered = np.sort(scores - scores.mean(0), axis=0)[::-1]
        # Both layers are initialized like torch.nn.Linear.
        inner = generator.uniform(-1, 1, 3 * h) / 2**0.5
        outer = generator.uniform(-1, 1, h + 1) / h**0.5
        columns.append((prompt, centered + training.bias * (prompt < 0.5), np.concatenate([inner, outer])))
    x, y, weights = (
        torch.from_numpy(np.stack(part, axis=-1).astype(np.float32)) for part in zip(*columns, strict=True)
    )
    return x, y, weights


def _scores(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return the scores r(x, y) of networks with one hidden layer, and that layer.

    Shapes: scores (2, pairs, seeds), the hidden layer (width, 2 pairs, seeds) and its inputs (2, 2 pairs, seeds).
    """
    h = (len(weights) - 1) // 4
    x_weight, y_weight, bias, outer = weights[:-1].view(4, h, 1, -1)
    inputs = torch.stack([x.repeat(2, 1), y.flatten(0, 1)])
    hidden = torch.addcmul(bias, x_weight, inputs[0]).addcmul_(y_weight, inputs[1]).relu_()
    return ((outer * hidden).sum(0) + weights[-1]).view_as(y), hidden, inputs


def _gradient(weights: Tensor, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Return the gradient of the mean loss over the batch, in the weights' shape.

    By hand, as autograd would record and walk every step.
    """
    scores, hidden, inputs = _scores(weights, x, y)
    chosen, rejected = scores.requires_grad_()
    (score_grad,) = torch.autograd.grad(loss(chosen, rejected).sum() / len(x), scores)
    score_grad = score_grad.flatten(0, 1)
    h = len(hidden)
    outer = weights[3 * h : 4 * h]
    active = (hidden > 0) * score_grad
    inner = torch.stack([(active * inputs[0]).sum(1), (active * inputs[1]).sum(1), active.sum(1)]) * outer
    return torch.cat([inner.flatten(0, 1), (hidden * score_grad).sum(1), score_grad.sum(0, keepdim=True)])


def _test(scores: Tensor) -> dict[str, NDArray[Any]]:
    """Return accuracy, icc and dead of scores (2, pairs, seeds), each (seeds,)."""
    chosen, rejected = scores
    accuracy = (chosen > rejected).float().mean(0) + 0.5 * (chosen == rejected).float().mean(0)
    dead = ~(scores.amax((0, 1)) - scores.amin((0, 1)) > _CONSTANT)  # also where a score is not a number
    accuracy[dead] = 0.5  # a dead network ranks nothing
    variance = scores.flatten(0, 1).var(0, correction=0)
    icc = 2 * scores.mean(0).var(0, correction=0) / variance - 1
    icc[dead] = torch.nan
    return {"accuracy": accuracy.numpy(), "icc": icc.numpy(), "dead": dead.numpy()}
