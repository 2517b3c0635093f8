"""bf16 copies of float32 weights, which compute in their place."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch

from src.model.cpu.linear import OneDNNLinear
from src.model.grad_sums import GradSum, SummingLinear


class RoundedWeights:
    """Copies of all weights of a model, rounded to bf16, which compute in their place.

    Gradients of a copy are summed in its float32 weight's `grad`: by linear layers, embeddings and the head themselves
    (`src.model.grad_sums`), and for other weights as soon as autograd has them.
    """

    def __init__(self, model: torch.nn.Module, *, sum_in_linear: bool) -> None:
        """sum_in_linear: whether linear layers do so; torch.compile does not take a backward pass that adds up."""
        copies: dict[int, torch.nn.Parameter] = {}  # tied weights share one
        self._places: list[tuple[torch.nn.Module, str, torch.nn.Parameter, torch.nn.Parameter]] = []
        for module in model.modules():
            for name, weight in module._parameters.items():
                if weight is not None:
                    copy = copies.get(id(weight))
                    copies[id(weight)] = copy = _rounded(weight) if copy is None else copy
                    self._places.append((module, name, weight, copy))
        # A subclass computes in its own way, and its gradients are added as those of other modules are.
        linear = [module for module in model.modules() if type(module) in (torch.nn.Linear, OneDNNLinear)]
        self._linear = [(module, type(module)) for module in linear if sum_in_linear]
        self.outdated = False  # whether the weights have changed since they were rounded

    @contextlib.contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the copies take the weights' place for one micro-batch, forward and backward."""
        if self.outdated:
            trained = [(weight, copy) for _, _, weight, copy in self._places if weight.requires_grad]
            weights = {id(copy): (copy.data, weight.data) for weight, copy in trained}
            copies, exact = zip(*weights.values(), strict=True)
            torch._foreach_copy_(copies, exact)
            self.outdated = False
        try:
            for module, name, _, copy in self._places:
                module._parameters[name] = copy
            for module, _ in self._linear:
                module.__class__ = SummingLinear
            yield
        finally:
            for module, name, weight, _ in self._places:
                module._parameters[name] = weight
            for module, upstream in self._linear:
                module.__class__ = upstream


def _rounded(weight: torch.nn.Parameter) -> torch.nn.Parameter:
    copy: Any = torch.nn.Parameter(weight.detach().to(torch.bfloat16), weight.requires_grad)
    if weight.requires_grad:
        copy.grad_sum = GradSum(weight)
        copy.register_post_accumulate_grad_hook(_hand_over)
    return copy


def _hand_over(copy: Any) -> None:
    if copy.grad is not None:  # autograd calls this, too, where a layer has returned none
        copy.grad_sum.add(copy.grad)
        copy.grad = None
