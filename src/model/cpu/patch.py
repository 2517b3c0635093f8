"""The only entry to what is specific to CPUs: models on other devices keep the modules of transformers and torch."""

from __future__ import annotations

from typing import Any

import torch

from src.model.cpu.linear import OneDNNLinear
from src.model.cpu.lm_head import OneDNNHead
from src.model.lm_head import Head


def patch_for_cpu_(model: Any) -> None:
    """Swap the linear layers and the head of a model on a CPU, in place, by changing `__class__`."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is Head:
            module.__class__ = OneDNNHead
