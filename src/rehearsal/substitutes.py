"""What stands in the place of kernels that fake tensors cannot go through by themselves.

Most need nothing of the kind: torch and `src.model.fused_ops` give every operator a function for its shapes. Left is
the package flash-attn, whose compiled part needs a card.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import sys
from collections.abc import Iterator
from types import ModuleType
from typing import Any
from unittest import mock

import torch
from torch import Tensor


# The function of flash-attn's interface, as release 2.8 has it.
@torch.library.custom_op("flash_attn::varlen_attn_forward", mutates_args=())
def flash_attn_forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_size: list[int],
) -> tuple[Tensor, Tensor]:
    """Return the output, like q, and the log-sum-exp of the scores, (heads, tokens) float32."""
    raise NotImplementedError("only its shapes are known here")


@flash_attn_forward.register_fake
def _(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    window_size: list[int],
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("flash_attn::varlen_attn_backward", mutates_args=())
def flash_attn_backward(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window_size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, in their dtype."""
    raise NotImplementedError("only its shapes are known here")


@flash_attn_backward.register_fake
def _(
    grad: Tensor,
    q: Tensor,
    k: Tensor,
    v: Tensor,
    out: Tensor,
    lse: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    window_size: list[int],
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *bounds: Any) -> Tensor:
        out, lse = flash_attn_forward(q, k, v, *bounds)
        ctx.save_for_backward(q, k, v, out, lse, *bounds[:2])
        ctx.window_size = bounds[-1]
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *flash_attn_backward(grads[0], *ctx.saved_tensors, ctx.window_size), None, None, None, None, None


def flash_attn_varlen_func(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens_q: Tensor,
    cu_seqlens_k: Tensor,
    max_seqlen_q: int,
    max_seqlen_k: int,
    dropout_p: float = 0.0,
    softmax_scale: float | None = None,
    causal: bool = False,
    window_size: tuple[int, int] = (-1, -1),
    softcap: float = 0.0,
    alibi_slopes: Tensor | None = None,
    deterministic: bool = False,
    return_attn_probs: bool = False,
    block_table: Tensor | None = None,
) -> Tensor:
    """Take the place of flash_attn.flash_attn_varlen_func: its signature, outputs and what it keeps for backward."""
    assert causal and not (dropout_p or softcap or return_attn_probs), "as src.model.attention calls it"
    bounds = cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k, list(window_size)
    return _FlashAttention.apply(q, k, v, *bounds)


@contextlib.contextmanager
def flash_attn_installed() -> Iterator[None]:
    """Let `import flash_attn` find the substitute."""
    module: Any = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    with mock.patch.dict(sys.modules, {"flash_attn": module}):
        yield
