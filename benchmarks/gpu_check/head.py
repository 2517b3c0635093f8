"""Log-probs of the head and their gradients against float64: values, hidden states, weight and bias.

The yardstick in bf16 is plain cross-entropy under autocast, which is what other trainers compute.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from benchmarks.gpu_check.errors import error_ratios, relative_errors, worst
from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting
from src.model.lm_head import Head
from src.model.logprobs import NumericsConfig

NAMES = ("log-probs", "gradient of hidden states", "gradient of the weight", "gradient of the bias")
FLOAT32 = Limit(1e-5, "sums of float32 products over the width or the positions")
BF16 = Limit(1.2, "not further from float64 than cross-entropy of bf16 logits under autocast; 20 % for order of sums")


class Case(NamedTuple):
    positions: int
    width: int
    vocabulary: int
    has_bias: bool

    @property
    def label(self) -> str:
        bias = ", bias" if self.has_bias else ""
        return f"{self.positions} positions, width {self.width}, vocabulary {self.vocabulary}{bias}"


def cases(on_card: bool) -> list[Case]:
    """Return shapes below, at and just above what the head computes at once."""
    if on_card:
        return [Case(3000, 3072, 128_256, False), Case(1025, 4096, 128_256, True), Case(1, 512, 32_000, False)]
    return [Case(1025, 32, 2049, True), Case(300, 64, 500, False), Case(1, 32, 300, False)]


def run(setting: Setting) -> list[Row]:
    return [row for case in cases(setting.on_card) for row in check_case(setting, case)]


def check_case(setting: Setting, case: Case) -> list[Row]:
    """Return the worst error of value and gradients, in float32 and bf16."""
    hidden, weight, bias, targets = random_inputs(case, setting.device)
    rows = []
    for precision, dtype in (("fp32", torch.float32), ("bf16", torch.bfloat16)):
        # What is rounded to bf16 on the way in is not the head's error.
        inputs = [x.to(dtype).float() for x in (hidden, weight, bias) if x is not None]
        numerics, computed = NumericsConfig(precision), [inputs[0], *(x.to(dtype) for x in inputs[1:])]
        plain_function = partial(cross_entropy, targets=targets)
        exact = with_gradients(plain_function, [x.double() for x in inputs])
        actual = with_gradients(partial(through_head, targets=targets, numerics=numerics), computed)
        errors, kind, limit = relative_errors(actual, exact), "error to float64", FLOAT32
        if precision == "bf16":
            with numerics.autocast(setting.device):
                plain = with_gradients(plain_function, inputs)
            errors, kind, limit = error_ratios(actual, plain, exact), "error over that of plain bf16", BF16
        rows.append(worst(setting, f"{precision}, {case.label}: {kind}", errors, NAMES, limit))
    return rows


def random_inputs(case: Case, device: torch.device) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Return hidden states, weight, bias and targets; logits have a standard deviation of 6, as a trained model's."""
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(case.positions, case.width, generator=generator)
    weight = 6 * case.width**-0.5 * torch.randn(case.vocabulary, case.width, generator=generator)
    bias = torch.randn(case.vocabulary, generator=generator).to(device) if case.has_bias else None
    targets = torch.randint(case.vocabulary, (case.positions,), generator=generator)
    targets[0], targets[-1] = 0, case.vocabulary - 1
    return hidden.to(device), weight.to(device), bias, targets.to(device)


def through_head(
    hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, targets: Tensor, numerics: NumericsConfig
) -> Tensor:
    """Return log-probs of the project's head with these weights."""
    with torch.device("meta"):
        head = Head(weight.shape[1], weight.shape[0], bias=bias is not None)
    with numerics.autocast(hidden.device):
        return torch.func.functional_call(head, parameters(weight, bias), (hidden, targets))


def parameters(weight: Tensor, bias: Tensor | None) -> dict[str, Tensor]:
    return {"weight": weight} | ({} if bias is None else {"bias": bias})


def cross_entropy(hidden: Tensor, weight: Tensor, bias: Tensor | None = None, *, targets: Tensor) -> Tensor:
    """Return log-probs of plain torch: one product, the softmax at least float32."""
    logits = F.linear(hidden, weight, bias)
    return -F.cross_entropy(logits.to(torch.promote_types(logits.dtype, torch.float32)), targets, reduction="none")


def with_gradients(function: Callable[..., Tensor], inputs: list[Tensor]) -> list[Tensor]:
    """Return the log-probs and the gradients of a weighted sum of them by every input."""
    inputs = [x.detach().requires_grad_() for x in inputs]
    logps = function(*inputs)
    weights = torch.linspace(-1, 1, len(logps), device=logps.device, dtype=logps.dtype) + 0.1
    return [logps.detach(), *torch.autograd.grad((logps * weights).sum(), inputs)]
