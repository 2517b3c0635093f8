"""Attention over a packed, shared-prefix batch: every backend that can compute it, registered with transformers."""

from __future__ import annotations

import importlib.util
import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch.nn.attention import varlen as torch_varlen
from transformers import AttentionInterface

from src.errors import ConfigError
from src.model.cpu.attention import BlockAttention
from src.model.cpu.linear import ONEDNN
from src.model.files import why_not_supported, why_too_long

if TYPE_CHECKING:
    from torch import Tensor

    from src.model.packing import Layout


ONEDNN_MIN_MEAN_SEGMENT = 128  # tokens; measured at 64 dimensions a head


def sdpa(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout, window: int | None = None
) -> Tensor:
    """Run torch's scaled_dot_product_attention once per segment: any device, any precision."""
    # One split has one concatenation as its gradient; slices would each have a gradient of the full size.
    edges = sorted({0, *(edge for s in layout.segments for edge in (s.start, s.end, s.prefix_start, s.prefix_end))})
    index_of = {edge: index for index, edge in enumerate(edges)}
    sizes = [end - start for start, end in pairwise(edges)]
    keys, values = key.split(sizes, dim=2), value.split(sizes, dim=2)
    queries = query.split([s.end - s.start for s in layout.segments], dim=2)
    outputs = []
    for s, q in zip(layout.segments, queries, strict=True):
        prefix, causal = (
            range(index_of[s.prefix_start], index_of[s.prefix_end]),
            range(index_of[s.start], index_of[s.end]),
        )
        k, v = (torch.cat([pieces[i] for i in (*prefix, *causal)], dim=2) for pieces in (keys, values))
        mask = None
        prefix_length, num_keys = s.prefix_end - s.prefix_start, k.shape[2]
        if prefix_length or (window is not None and window < num_keys):
            # Causal, aligned to the bottom right: query i attends to the whole prefix and to itself up to i.
            mask = torch.ones(q.shape[2], num_keys, dtype=torch.bool, device=q.device).tril(prefix_length)
            mask = mask if window is None else mask.triu(prefix_length - window + 1)
        outputs.append(
            F.scaled_dot_product_attention(
                q,
                k,
                v,
                attn_mask=mask,
                is_causal=mask is None,
                scale=scaling,
                enable_gqa=q.shape[1] != k.shape[1],
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def onednn(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout, window: int | None = None
) -> Tensor:
    """Multiply blocks of queries through oneDNN: float32 on a CPU. Short segments are faster through sdpa."""
    has_short_segments = query.shape[2] < ONEDNN_MIN_MEAN_SEGMENT * len(layout.segments)
    if has_short_segments or query.dtype != torch.float32 or query.shape[3] != value.shape[3]:
        return sdpa(query, key, value, scaling, layout, window)
    return BlockAttention.apply(query, key, value, layout.segments, scaling or query.shape[3] ** -0.5, window)


def varlen(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout, window: int | None = None
) -> Tensor:
    """Run torch's variable-length kernel (FlashAttention inside) once for all segments: bf16, CUDA."""
    q, k, v = _unpadded(query, key, value, layout)
    # torch 2.11 has no enable_gqa and always allows fewer key-value heads; from 2.12 on they must be allowed.
    has_enable_gqa = "enable_gqa" in inspect.signature(torch_varlen.varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if has_enable_gqa else {}
    output: Any = torch_varlen.varlen_attn(
        q,
        k,
        v,
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        scale=scaling,
        # Causal; with fewer queries than keys, aligned to the bottom right: both ends are positions of a sequence.
        window_size=(-1 if window is None else window - 1, 0),
        **options,
    )
    return output[None]


def flash_attention_2(
    query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout, window: int | None = None
) -> Tensor:
    """Run the package flash-attn once for all segments: bf16, CUDA."""
    from flash_attn import flash_attn_varlen_func

    output = flash_attn_varlen_func(
        *_unpadded(query, key, value, layout),
        layout.cu_seqlens_q,
        layout.cu_seqlens_k,
        layout.max_seqlen_q,
        layout.max_seqlen_k,
        softmax_scale=scaling,
        causal=True,
        window_size=(-1 if window is None else window - 1, -1 if window is None else 0),
        # Otherwise the gradient of the queries is summed in an arbitrary order. torch's varlen_attn asks by itself.
        deterministic=torch.are_deterministic_algorithms_enabled(),
    )
    return output[None]


def _unpadded(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """Return (tokens, heads, d) of (1, heads, n, d) in bf16, with the keys and values of every segment in a row."""
    # Not x[0], whose gradient would be copied into zeros.
    q, k, v = (x.squeeze(0).transpose(0, 1).to(torch.bfloat16) for x in (query, key, value))
    # A position is in two segments at most, so its gradient has two terms: their order does not change the sum.
    return q, k.index_select(0, layout.key_positions), v.index_select(0, layout.key_positions)


ATTENTION_BACKENDS = {backend.__name__: backend for backend in (sdpa, onednn, varlen, flash_attention_2)}


def registered_name(backend: str) -> str:
    """Return the name under which transformers knows the backend (`attn_implementation`).

    transformers takes any name with `flash` in it for a kernel of its own and looks for that on the hub.
    """
    return f"packed_{backend}".replace("flash_attention", "fa")


def _register(name: str) -> None:
    @torch.compiler.disable  # segments differ in every batch and would be recompiled each time
    def packed_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        layout: Layout | None = None,
        sliding_window: int | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Return attention (1, n, heads, d) in which each segment attends to itself causally and to its prefix.

        query: (1, heads, n, d); key, value: (1, kv_heads, n, d). sliding_window: of the layer, as transformers passes
        it: tokens of its own sequence that one attends to, itself included.
        """
        assert layout is not None, "the packed path passes a layout to the model"
        return ATTENTION_BACKENDS[name](query, key, value, scaling, layout, sliding_window), None

    AttentionInterface.register(registered_name(name), packed_attention)


for _name in ATTENTION_BACKENDS:
    _register(_name)


def resolve_backend(requested: str, device: torch.device, precision: str) -> tuple[str, str]:
    """Return the backend for model.attention=`requested` on this device, and the reason.

    Raises ConfigError when the requested backend cannot run.
    """
    reasons = {
        "sdpa": None,
        "onednn": why_not_onednn(device, precision),
        "varlen": why_not_varlen(device, precision),
        "flash_attention_2": why_not_flash_attention_2(device, precision),
    }
    if requested != "auto":
        if reasons[requested]:
            raise ConfigError(f"model.attention={requested}: {reasons[requested]}; use model.attention=auto")
        return requested, "as configured"
    for name in ("flash_attention_2", "varlen", "onednn"):
        if reasons[name] is None:
            return name, "fastest available"
    return "sdpa", "; ".join(f"no {name}: {reason}" for name, reason in reasons.items() if reason)


def why_not_onednn(device: torch.device, precision: str) -> str | None:
    """Return the reason why the backend cannot run, or None."""
    if device.type != "cpu":
        return f"CPU only, device is {device.type}"
    if precision != "fp32":
        return f"requires fp32, but engine.precision={precision}"
    return None if ONEDNN else "this torch is built without oneDNN"


def why_not_flash_attention_2(device: torch.device, precision: str) -> str | None:
    """Return the reason why the backend cannot run, or None."""
    installed = importlib.util.find_spec("flash_attn")
    return why_not_varlen(device, precision) or (None if installed else "package flash-attn is not installed")


def why_not_varlen(device: torch.device, precision: str) -> str | None:
    """Return the reason why the backend cannot run, or None."""
    if device.type != "cuda":
        return f"CUDA only, device is {device.type}"
    if precision != "bf16":
        return f"requires bf16, but engine.precision={precision}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"requires compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None


def check_supported(config: Any, max_sequence_tokens: int) -> None:
    """Refuse a model whose log-probs this project would get wrong. Raises ConfigError.

    max_sequence_tokens: of training and sampling.
    """
    fields = config.to_dict()
    if reason := why_not_supported(fields) or why_too_long(fields, max_sequence_tokens):
        raise ConfigError(reason)
