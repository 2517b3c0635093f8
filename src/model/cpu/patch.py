"""The only entry to what is specific to CPUs: models on other devices keep the modules of transformers and torch."""

from __future__ import annotations

from typing import Any

import torch

from src.model.cpu.linear import OneDNNLinear, mm_nt
from src.model.lm_head import Head

VOCAB_CHUNK = 2048  # logits columns at once: with lm_head.TOKEN_CHUNK rows they stay in the cache


class OneDNNHead(Head, OneDNNLinear):
    """A head that multiplies through oneDNN and computes its logits in chunks of the vocabulary."""

    matmul_nt = staticmethod(mm_nt)
    vocab_chunk = VOCAB_CHUNK


def patch_for_cpu_(model: Any) -> None:
    """Swap the linear layers and the head of a model on a CPU, in place, by changing `__class__`."""
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = OneDNNLinear
        elif type(module) is Head:
            module.__class__ = OneDNNHead
