"""Many tiny networks trained at once: one seed each, seeds along the last axis of every tensor."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from src.losses import LOSSES
from src.toy.study import Training

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from torch import Tensor

_CONSTANT = 1e-6  # of a network's outputs: closer together they rank nothing


def train(training: Training, seeds: range) -> dict[str, NDArray[Any]]:
    """Each seed draws its own data and its own first weights. Returns a value a seed, each (seeds,): `accuracy`, the
    share of the test pairs ranked right, where a tie counts half; `icc`, ICC1 over the test prompts, NaN where the
    network is dead; `dead`, whether it gives everything the same score, or one that is no number."""
    x, y, weights = _drawn(training, seeds)
    split = round(training.train_fraction * training.prompts)
    step = _optimiser(training, weights)
    loss_fn: Any = LOSSES[training.objective]
    loss = partial(loss_fn, beta=training.beta, **_options(training.objective))
    for epoch in range(training.epochs):
        # One order for all: rows of a seed are independent draws, so any order of them is a random one.
        order = torch.from_numpy(np.random.default_rng(epoch).permutation(split))
        for batch in order.split(training.batch_size):
            step(_gradient(weights, x[batch], y[:, batch], loss))
    return _tested(_scores(weights, x[split:], y[:, split:])[0])


def _drawn(training: Training, seeds: range) -> tuple[Tensor, Tensor, Tensor]:
    """x: (prompts, seeds); y: (2, prompts, seeds), chosen and rejected; weights: (4 width + 1, seeds)."""
    n, h = training.prompts, training.width
    columns = []
    for seed in seeds:
        generator = np.random.default_rng(seed)
        place, scores = generator.random(n), generator.random((2, n))
        centred = np.sort(scores - scores.mean(0), axis=0)[::-1]
        # Both layers as torch.nn.Linear draws them.
        inner = generator.uniform(-1, 1, 3 * h) / 2**0.5
        outer = generator.uniform(-1, 1, h + 1) / h**0.5
        columns.append((place, centred + training.bias * (place < 0.5), np.concatenate([inner, outer])))
    x, y, weights = (
        torch.from_numpy(np.stack(part, axis=-1).astype(np.float32)) for part in zip(*columns, strict=True)
    )
    return x, y, weights


def _options(objective: str) -> dict[str, float]:
    return {"calibration_weight": 1.0} if objective == "cal_dpo" else {}


def _scores(weights: Tensor, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """r(x, y) of one hidden layer. Returns it (2, pairs, seeds), the hidden layer (width, 2 pairs, seeds) and its
    inputs (2, 2 pairs, seeds)."""
    h = (len(weights) - 1) // 4
    by_x, by_y, bias, outer = weights[:-1].view(4, h, 1, -1)
    inputs = torch.stack([x.repeat(2, 1), y.flatten(0, 1)])
    hidden = torch.addcmul(bias, by_x, inputs[0]).addcmul_(by_y, inputs[1]).relu_()
    return ((outer * hidden).sum(0) + weights[-1]).view_as(y), hidden, inputs


def _gradient(weights: Tensor, x: Tensor, y: Tensor, loss: Callable[[Tensor, Tensor], Tensor]) -> Tensor:
    """Of the mean loss over the batch, as large as the weights. By hand: autograd would keep and walk every step."""
    scores, hidden, inputs = _scores(weights, x, y)
    chosen, rejected = scores.requires_grad_()
    (by_score,) = torch.autograd.grad(loss(chosen, rejected).sum() / len(x), scores)
    by_score = by_score.flatten(0, 1)
    h = len(hidden)
    outer = weights[3 * h : 4 * h]
    active = (hidden > 0) * by_score
    inner = torch.stack([(active * inputs[0]).sum(1), (active * inputs[1]).sum(1), active.sum(1)]) * outer
    return torch.cat([inner.flatten(0, 1), (hidden * by_score).sum(1), by_score.sum(0, keepdim=True)])


def _optimiser(training: Training, weights: Tensor) -> Callable[[Tensor], None]:
    """Changes the weights in place, by torch's own step."""
    kinds: dict[str, Callable[..., torch.optim.Optimizer]] = {
        "adam": partial(torch.optim.Adam, foreach=False, fused=True),
        "sgd": torch.optim.SGD,
    }
    optimizer = kinds[training.optimizer]([weights], lr=training.lr)

    def step(gradient: Tensor) -> None:
        weights.grad = gradient
        optimizer.step()

    return step


def _tested(scores: Tensor) -> dict[str, NDArray[Any]]:
    """scores: (2, pairs, seeds)."""
    chosen, rejected = scores
    accuracy = (chosen > rejected).float().mean(0) + 0.5 * (chosen == rejected).float().mean(0)
    dead = ~(scores.amax((0, 1)) - scores.amin((0, 1)) > _CONSTANT)  # also where a score is not a number
    accuracy[dead] = 0.5  # it ranks nothing
    variance = scores.flatten(0, 1).var(0, correction=0)
    icc = 2 * scores.mean(0).var(0, correction=0) / variance - 1
    icc[dead] = torch.nan
    return {"accuracy": accuracy.numpy(), "icc": icc.numpy(), "dead": dead.numpy()}
