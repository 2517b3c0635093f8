"""Model and packed batch -> log-probs of the responses. The only log-prob path of the project: SFT, reference,
alignment, validation and KL all go through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from src import attention
from src.pairs import Example, PackedBatch, pack, partition

if TYPE_CHECKING:
    from torch import Tensor

# Logits held at once: this many positions times the vocabulary, in float32.
HEAD_CHUNK = 1024


def autocast(precision: str, device: torch.device) -> torch.autocast:
    """The precision everything of a run computes in: policy, reference and samples alike, or log-ratios would
    carry the difference of two roundings."""
    return torch.autocast(device.type, torch.bfloat16, enabled=precision == "bf16")


def sequence_logps(model: Any, batch: PackedBatch, precision: str = "fp32") -> tuple[Tensor, Tensor]:
    """Sum of log-probs and number of response tokens of every sequence of the batch.

    model: a transformers causal decoder with a linear head. Returns ((sequences,) float32 in nats,
    (sequences,) float32 counts). The head sees only positions that predict a response token, in chunks
    recomputed in the backward pass; the softmax is float32 whatever `precision` (fp32, bf16) the model computes in.
    """
    if model.config._attn_implementation != attention.NAME:
        model.set_attn_implementation(attention.NAME)
    with autocast(precision, batch.input_ids.device):
        hidden = model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            segments=batch.segments,
        ).last_hidden_state[0]
        hidden = hidden[batch.predict_from]
        head = model.get_output_embeddings()
        chunks = []
        for h, t in zip(hidden.split(HEAD_CHUNK), batch.targets.split(HEAD_CHUNK), strict=True):
            recompute = torch.is_grad_enabled()
            chunks.append(
                checkpoint(_token_logps, head, h, t, use_reentrant=False) if recompute else _token_logps(head, h, t)
            )
    logps = torch.cat(chunks)
    zeros = logps.new_zeros(batch.sequences)
    return zeros.index_add(0, batch.sequence, logps), zeros.index_add(0, batch.sequence, torch.ones_like(logps))


class SequenceLogps(torch.nn.Module):
    """`sequence_logps` of one model as a module: what data parallelism wraps, for it acts on calls of a module."""

    def __init__(self, model: Any, precision: str) -> None:
        super().__init__()
        self.model, self.precision = model, precision

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return sequence_logps(self.model, batch, self.precision)


def _token_logps(head: torch.nn.Module, hidden: Tensor, targets: Tensor) -> Tensor:
    """(t, d), (t,) -> (t,) float32 log-probs."""
    return -F.cross_entropy(head(hidden).float(), targets, reduction="none")


@torch.no_grad()
def score(
    model: Any, examples: Sequence[Example], token_budget: int, precision: str = "fp32"
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Log-prob sums of many examples: yields (indices, logps, tokens), sequences in order of (example, response)."""
    model.eval()
    device = next(model.parameters()).device
    lengths = [e.length for e in examples]
    for indices in partition(lengths, range(len(examples)), token_budget):
        logps, tokens = sequence_logps(model, pack(examples, indices).to(device), precision)
        yield indices, logps.cpu(), tokens.cpu()
