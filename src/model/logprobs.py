"""Model and packed batch -> log-probs of the responses.

The only log-prob path of the project: SFT, reference, alignment, validation and KL all use it.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import cache
from typing import Any

import torch
from torch import Tensor

from src.data.examples import Example
from src.distributed import EVERYTHING, Share
from src.errors import ConfigError
from src.hardware import HeapTrimmer
from src.model import attention
from src.model.cpu.patch import patch_for_cpu_
from src.model.fused import set_fused_
from src.model.lm_head import Head, next_token_kl
from src.model.numerics import FLOAT32, NumericsConfig, keep_residual_float32_
from src.model.packing import PackedBatch, pack, pack_first_fit

SCORING_TOKEN_BUDGET = 16384  # without gradients only the activations of one layer are held

# Decoders of transformers whose layers are as below; others keep their last layer: correct, only slower.
_DECODERS = ("LlamaModel", "MistralModel", "Qwen2Model", "Qwen3Model")


class SparseOutputLayer(torch.nn.Module):
    """A decoder layer that returns some positions only; the others matter to attention alone."""

    input_layernorm: torch.nn.Module
    self_attn: torch.nn.Module
    post_attention_layernorm: torch.nn.Module
    mlp: torch.nn.Module

    def forward(self, hidden_states: Tensor, *, output_positions: Tensor | None = None, **kwargs: Any) -> Tensor:
        """Return (1, n, width); with output_positions (t,) int64: (1, t, width)."""
        if output_positions is None:
            return super().forward(hidden_states, **kwargs)
        attended, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        hidden_states = (hidden_states + attended)[:, output_positions]
        return hidden_states + self.mlp(self.post_attention_layernorm(hidden_states))


@cache
def _sparse_output(layer: type) -> Any:
    return type(f"SparseOutput{layer.__name__}", (SparseOutputLayer, layer), {})


def patch_model_(model: Any, device: torch.device | None = None) -> Any:
    """Patch a transformers causal LM in place, by changing `__class__`, and return it.

    Its embeddings return float32, its head can return log-probs of targets, and its last layer can compute some
    positions only. On a CPU all linear layers are swapped too; elsewhere every other module stays as it is. Parameters
    and their names do not change.

    device: where the model will compute; by default where its weights are. Raises ConfigError for a head that is not
    one linear layer.
    """
    head = model.get_output_embeddings()
    if type(head) is torch.nn.Linear:
        head.__class__ = Head
    if not isinstance(head, Head):
        raise ConfigError(f"model {model.config.model_type}: its head is {type(head).__name__}, not one linear layer")
    keep_residual_float32_(model)
    for module in model.modules():
        if type(module).__name__ in _DECODERS and not isinstance(last := module.layers[-1], SparseOutputLayer):
            last.__class__ = _sparse_output(type(last))  # type: ignore[arg-type]
    if (device or head.weight.device).type == "cpu":
        patch_for_cpu_(model)
    return model


def configure_(model: Any, numerics: NumericsConfig) -> None:
    """Let a model compute packed batches by these numerics, in place: its attention, and fused kernels or not."""
    name = attention.registered_name(numerics.attention)
    if model.config._attn_implementation != name:
        model.set_attn_implementation(name)
    set_fused_(model, numerics.fused)


def _hidden_states(model: Any, batch: PackedBatch, numerics: NumericsConfig) -> Tensor:
    """Return the hidden states of the positions that predict a response token, (t, width); inside autocast."""
    configure_(model, numerics)
    sparse_output = any(isinstance(module, SparseOutputLayer) for module in model.modules())
    options = {"output_positions": batch.predict_positions} if sparse_output else {}
    hidden = model.base_model(
        input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, layout=batch.layout, **options
    ).last_hidden_state.squeeze(0)
    return hidden if sparse_output else hidden[batch.predict_positions]


def _sum_by_sequence(values: Tensor, batch: PackedBatch) -> Tensor:
    return values.new_zeros(batch.num_sequences).index_add(0, batch.sequence_ids, values)


def sequence_logps(model: Any, batch: PackedBatch, numerics: NumericsConfig = FLOAT32) -> tuple[Tensor, Tensor]:
    """Return the sum of log-probs and the number of response tokens of every sequence of the batch.

    model: a patched causal LM. Both are (sequences,) float32, log-probs in nats. The head computes only positions that
    predict a response token; the softmax is float32 whatever precision the model computes in.
    """
    with numerics.autocast(batch.input_ids.device):
        logps = model.get_output_embeddings()(_hidden_states(model, batch, numerics), batch.targets)
    return _sum_by_sequence(logps, batch), _sum_by_sequence(torch.ones_like(logps), batch)


@torch.no_grad()
def sequence_kl(
    policy: Any, initial: Any, batch: PackedBatch, numerics: NumericsConfig = FLOAT32
) -> tuple[Tensor, Tensor, Tensor]:
    """Return log-probs under the policy and under the initial model, and KL, of every sequence: (sequences,), nats.

    KL is the sum, over the prefixes of a response, of the divergence of the policy's next-token distribution from the
    initial model's.
    """
    with numerics.autocast(batch.input_ids.device):
        heads = [model.get_output_embeddings() for model in (policy, initial)]
        hidden = [_hidden_states(model, batch, numerics) for model in (policy, initial)]
        logps = [head(states, batch.targets) for head, states in zip(heads, hidden, strict=True)]
        kl = next_token_kl(heads[0], hidden[0], heads[1], hidden[1])
    policy_logps, initial_logps, kl = (_sum_by_sequence(values, batch) for values in (*logps, kl))
    return policy_logps, initial_logps, kl


class SequenceLogps(torch.nn.Module):
    """`sequence_logps` of one model as a module, which DDP and DeepSpeed wrap."""

    def __init__(self, model: Any, numerics: NumericsConfig) -> None:
        super().__init__()
        self.model, self.numerics = model, numerics
        configure_(model, numerics)  # before FSDP2 changes the classes of modules

    def forward(self, batch: PackedBatch) -> tuple[Tensor, Tensor]:
        return sequence_logps(self.model, batch, self.numerics)


@torch.no_grad()
def iter_logps(
    model: Any,
    examples: Sequence[Example],
    token_budget: int | None,
    numerics: NumericsConfig = FLOAT32,
    share: Share = EVERYTHING,
) -> Iterator[tuple[list[int], Tensor, Tensor]]:
    """Yield (indices, logps, tokens) for micro-batches of the examples, sequences in order of (example, response)."""
    for indices, batch in _batches(model, examples, token_budget, share):
        logps, tokens = sequence_logps(model, batch, numerics)
        yield indices, logps.cpu(), tokens.cpu()


def iter_kl(
    policy: Any,
    initial: Any,
    examples: Sequence[Example],
    token_budget: int | None,
    numerics: NumericsConfig = FLOAT32,
    share: Share = EVERYTHING,
) -> Iterator[tuple[list[int], Tensor, Tensor, Tensor]]:
    """Yield (indices, policy_logps, initial_logps, kl) of `sequence_kl` for micro-batches of the examples."""
    initial.eval()
    for indices, batch in _batches(policy, examples, token_budget, share):
        policy_logps, initial_logps, kl = sequence_kl(policy, initial, batch, numerics)
        yield indices, policy_logps.cpu(), initial_logps.cpu(), kl.cpu()


def _batches(
    model: Any, examples: Sequence[Example], token_budget: int | None, share: Share
) -> Iterator[tuple[list[int], PackedBatch]]:
    model.eval()
    device = next(model.parameters()).device
    heap = HeapTrimmer()
    lengths = [e.length for e in examples]
    for indices in share.of(pack_first_fit(lengths, range(len(examples)), token_budget or SCORING_TOKEN_BUDGET)):
        yield indices, pack(examples, indices).to(device)
        heap.maybe_trim()
