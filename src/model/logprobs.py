"""Model and packed batch -> log-probs of the responses. The only log-prob path of the project: SFT, reference,
alignment, validation and KL all go through it."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch

from src.data.examples import Example
from src.errors import ConfigError
from src.hardware import HeapTrimmer
from src.model import attention
from src.model.cpu.linear import Linear
from src.model.last_layer import LastLayer, prepare_layers
from src.model.lm_head import Head
from src.model.packing import PackedBatch, pack, pack_first_fit

if TYPE_CHECKING:
    from torch import Tensor


@dataclass(frozen=True)
class NumericsConfig:
    """How everything of a run computes: policy, reference and samples alike, or log-ratios would carry the difference
    of two roundings."""

    precision: str = "fp32"  # or bf16, over float32 weights
    attention: str = "sdpa"  # a kernel of src.model.attention

    def autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


FLOAT32 = NumericsConfig()

SCORING_TOKEN_BUDGET = 16384  # without gradients the activations of a single layer are all the memory it takes


def patch_model_(model: Any) -> Any:
    """Let a transformers causal decoder take this path, in place: its layers and its head learn what the path asks of
    them. Parameters and their names stay. Raises ConfigError for a head that is not one linear layer."""
    head = model.get_output_embeddings()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.__class__ = Head if module is head else Linear
    if not isinstance(head, Head):
        raise ConfigError(f"model {model.config.model_type}: its head is {type(head).__name__}, not one linear layer")
    prepare_layers(model)
    return model


def sequence_logps(model: Any, batch: PackedBatch, numerics: NumericsConfig = FLOAT32) -> tuple[Tensor, Tensor]:
    """Sum of log-probs and number of response tokens of every sequence of the batch.

    model: a transformers causal decoder, prepared. Returns ((sequences,) float32 in nats,
    (sequences,) float32 counts). The head sees only positions that predict a response
    token; the softmax is float32 whatever precision the model computes in.
    """
    name = attention.registered_name(numerics.attention)
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    only = {"only": batch.predict_from} if any(isinstance(m, LastLayer) for m in model.modules()) else {}
    with numerics.autocast(batch.input_ids.device):
        hidden = model.base_model(
            input_ids=batch.input_ids,
            position_ids=batch.position_ids,
            use_cache=False,
            layout=batch.layout,
            **only,
        ).last_hidden_state[0]
        logps = model.get_output_embeddings()(hidden if only else hidden[batch.predict_from], batch.targets)
    zeros = logps.new_zeros(batch.sequences)
    return zeros.index_add(0, batch.sequence, logps), zeros.index_add(0, batch.sequence, torch.ones_like(logps))


class SequenceLogps(torch.nn.Module):
    """`sequence_logps` of one model as a module: what data parallelism wraps, for it acts on calls of a module."""

    def __init__(self, model: Any, numerics: NumericsConfig) -> None:
        super().__init__()
        self.model, self.numerics = model, numerics
        # A checkpoint to resume from holds what is trained: with LoRA little beside the model it starts from.
        self.frozen = {name for name, parameter in self.named_parameters() if not parameter.requires_grad}
        if self.frozen:
            self.register_state_dict_post_hook(_drop_frozen)

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return sequence_logps(self.model, batch, self.numerics)


def _drop_frozen(module: Any, state: dict[str, Tensor], prefix: str, _: Any) -> None:
    for name in module.frozen:
        state.pop(prefix + name, None)


@torch.no_grad()
def iter_logps(
    model: Any, examples: Sequence[Example], token_budget: int | None, numerics: NumericsConfig = FLOAT32
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Log-prob sums of many examples: yields (indices, logps, tokens), sequences in order of (example, response)."""
    model.eval()
    device = next(model.parameters()).device
    lengths = [e.length for e in examples]
    freed = HeapTrimmer()
    for indices in pack_first_fit(lengths, range(len(examples)), token_budget or SCORING_TOKEN_BUDGET):
        logps, tokens = sequence_logps(model, pack(examples, indices).to(device), numerics)
        freed.maybe_trim()
        yield indices, logps.cpu(), tokens.cpu()
