"""The baseline of the packed path: every sequence in its own row, padded to the longest."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from src.data.examples import Example


def padded_logps(model: Any, examples: Sequence[Example], attention: str = "eager") -> torch.Tensor:
    """Return (sequences,) summed response log-probs, from full logits and one copy of the prompt per response."""
    model.set_attn_implementation(attention)
    rows = [(e.prompt, r) for e in examples for r in e.responses]
    longest = max(len(p) + len(r) for p, r in rows)
    ids = torch.zeros(len(rows), longest, dtype=torch.long)
    mask, response = torch.zeros_like(ids), torch.zeros(len(rows), longest)
    for i, (p, r) in enumerate(rows):
        ids[i, : len(p) + len(r)] = torch.tensor(p + r)
        mask[i, : len(p) + len(r)] = 1
        response[i, len(p) : len(p) + len(r)] = 1
    logits = model(input_ids=ids, attention_mask=mask).logits[:, :-1].float()
    logps = logits.log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]
    return (logps * response[:, 1:]).sum(-1)
