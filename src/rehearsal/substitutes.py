"""What stands in the place of kernels that fake tensors cannot go through by themselves.

Most need nothing of the kind: torch and `src.model.fused_ops` give every operator a function for its shapes. Left are
the package flash-attn, whose compiled part needs a card, and signatures of other releases of torch.
"""

from __future__ import annotations

import contextlib
import importlib.machinery
import inspect
import sys
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest import mock

import torch
import yaml
from torch import Tensor
from torch.nn.attention import varlen

from src.errors import ConfigError

SIGNATURES_FILE = Path(__file__).with_name("varlen_signatures.yaml")


# --- flash-attn: the function of its interface, as release 2.8 has it ---
@torch.library.custom_op("flash_attn::varlen_attn_forward", mutates_args=())
def flash_attn_forward(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[Tensor, Tensor]:
    """Return the output, like q, and the log-sum-exp of the scores, (heads, tokens) float32."""
    raise NotImplementedError("only its shapes are known here")


@flash_attn_forward.register_fake
def _(
    q: Tensor, k: Tensor, v: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor, max_seqlen_q: int, max_seqlen_k: int
) -> tuple[Tensor, Tensor]:
    return torch.empty_like(q), q.new_empty(q.shape[1], q.shape[0], dtype=torch.float32)


@torch.library.custom_op("flash_attn::varlen_attn_backward", mutates_args=())
def flash_attn_backward(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the gradients of q, k and v, in their dtype."""
    raise NotImplementedError("only its shapes are known here")


@flash_attn_backward.register_fake
def _(
    grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, lse: Tensor, cu_seqlens_q: Tensor, cu_seqlens_k: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v)


class _FlashAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor, *bounds: Any) -> Tensor:
        out, lse = flash_attn_forward(q, k, v, *bounds)
        ctx.save_for_backward(q, k, v, out, lse, *bounds[:2])
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *flash_attn_backward(grads[0], *ctx.saved_tensors), None, None, None, None


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
    return _FlashAttention.apply(q, k, v, cu_seqlens_q, cu_seqlens_k, max_seqlen_q, max_seqlen_k)


@contextlib.contextmanager
def flash_attn_installed() -> Iterator[None]:
    """Let `import flash_attn` find the substitute."""
    module: Any = ModuleType("flash_attn")
    module.__spec__ = importlib.machinery.ModuleSpec("flash_attn", None)
    module.flash_attn_varlen_func = flash_attn_varlen_func
    with mock.patch.dict(sys.modules, {"flash_attn": module}):
        yield


# --- signatures of other releases of torch ---
@cache
def varlen_signatures() -> dict[str, inspect.Signature]:
    """Return torch's release -> the signature of its varlen_attn."""
    rows = yaml.safe_load(SIGNATURES_FILE.read_text(encoding="utf-8"))
    names: dict[str, Any] = {}
    for release, text in rows.items():
        exec(f"def signature{text}: ...", names)
        rows[release] = inspect.signature(names["signature"])
    return rows


@contextlib.contextmanager
def torch_of(release: str) -> Iterator[None]:
    """Give varlen_attn the signature that it has in this release of torch. Raises ConfigError for an unknown one."""
    if release not in varlen_signatures():
        raise ConfigError(f"torch_signatures={release}: known are {', '.join(varlen_signatures())}")
    with mock.patch.object(varlen, "varlen_attn", _restricted(varlen.varlen_attn, varlen_signatures()[release])):
        yield


def _restricted(function: Callable[..., Any], signature: inspect.Signature) -> Callable[..., Any]:
    accepted = inspect.signature(function).parameters

    def restricted(*args: Any, **kwargs: Any) -> Any:
        try:
            bound = signature.bind(*args, **kwargs)
        except TypeError as error:
            raise TypeError(f"varlen_attn() {error}") from None
        options = {name: value for name, value in bound.arguments.items() if name in accepted}
        if "enable_gqa" not in signature.parameters:  # there it always is
            options["enable_gqa"] = True
        return function(**options)

    restricted.__signature__ = signature  # type: ignore[attr-defined]
    return restricted
