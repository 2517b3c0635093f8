"""What engine.precision means, in one place, for everything that computes: training, log-probs, KL and samples.

`bf16`: weights are rounded to bf16 for the computation (the master weights that training updates stay float32),
products multiply bf16 and accumulate in float32, keys and values of the cache are bf16. The residual stream, norms,
softmax and log-probs are float32. `fp32`: everything is float32.

Policy, reference and samples share one definition. If they did not, log-ratios would contain the difference of their
roundings, which is larger than what a step of alignment changes.
"""

from __future__ import annotations

import os
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor
from torch.utils import deterministic

from src.model.grad_sums import SummingEmbedding, grad_sum_of


@dataclass(frozen=True)
class NumericsConfig:
    """Numerics shared by policy, reference and sampling."""

    precision: str = "fp32"  # or bf16
    attention: str = "sdpa"  # a key of ATTENTION_BACKENDS
    fused: bool = False  # norms, rotary embeddings and SwiGLU as one kernel each

    def autocast(self, device: torch.device) -> torch.autocast:
        """Return the context of every forward pass: with bf16 it casts activations where products take bf16."""
        return torch.autocast(device.type, torch.bfloat16, enabled=self.precision == "bf16")


FLOAT32 = NumericsConfig()


def cast_for_inference_(model: Any, numerics: NumericsConfig) -> Any:
    """Round a model's weights to what the computation uses, in place, and return it: a copy that is not trained.

    Training keeps float32 master weights and rounds them in the same way (`src.training.rounded_weights`, FSDP2's
    MixedPrecisionPolicy, DeepSpeed's bf16), so that log-probs are those of the training's own forward pass. Buffers,
    such as the frequencies of rotary embeddings, stay as they are. Adapters must have been merged.
    """
    if numerics.precision == "bf16":
        for parameter in model.parameters():
            parameter.data = parameter.data.to(torch.bfloat16)
    return model


def round_(parameters: Iterable[Tensor], dtype: torch.dtype) -> None:
    """Round float32 weights to the values that a dtype has, in place."""
    if dtype != torch.float32:
        for parameter in parameters:
            parameter.data = parameter.data.to(dtype).to(torch.float32)


def set_deterministic(enabled: bool) -> None:
    """Make a GPU sum in a fixed order, or in any. On a CPU results are the same bits either way.

    Nondeterministic otherwise: the gradient of queries in attention, the largest difference, and gradients of
    embeddings. Call it before the first product on a GPU.
    """
    if enabled:
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # read when cuBLAS starts
    torch.use_deterministic_algorithms(enabled, warn_only=True)
    deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]  # only to find bugs, and slow


class Float32Embedding(torch.nn.Embedding):
    """An embedding whose output, the beginning of the residual stream, is float32 also where its weight is bf16."""

    def forward(self, input: Tensor) -> Tensor:
        if (grad_sum := grad_sum_of(self.weight)) is not None:
            return SummingEmbedding.apply(input, self.weight, self.padding_idx, grad_sum)
        embedded = super().forward(input)
        return embedded.to(torch.promote_types(embedded.dtype, torch.float32))


@cache
def _float32_embedding(embedding: type) -> Any:
    if embedding is torch.nn.Embedding:
        return Float32Embedding
    # The subclass comes first, so that what it does to the output (Gemma scales it) is done in float32.
    return type(f"Float32{embedding.__name__}", (embedding, Float32Embedding), {})


class Float32LayerNorm(torch.nn.LayerNorm):
    """A LayerNorm that is computed in float32 also where its weight is bf16: CUDA's autocast does so, a CPU's not."""

    def forward(self, input: Tensor) -> Tensor:
        weight, bias = (x if x is None else x.to(input.dtype) for x in (self.weight, self.bias))
        return torch.nn.functional.layer_norm(input, self.normalized_shape, weight, bias, self.eps)


def keep_residual_float32_(model: Any) -> None:
    """Swap the embeddings of tokens and positions and the LayerNorms, in place, by changing `__class__`."""
    for module in model.modules():
        if isinstance(module, torch.nn.Embedding) and not isinstance(module, Float32Embedding):
            module.__class__ = _float32_embedding(type(module))  # type: ignore[arg-type]
        elif type(module) is torch.nn.LayerNorm:
            module.__class__ = Float32LayerNorm
