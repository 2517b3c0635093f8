"""Attention over a packed, shared-prefix batch, registered with transformers once for every kernel that can do it."""

from __future__ import annotations

import importlib.util
import inspect
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from src.errors import ConfigError
from src.model.cpu import kernels
from src.model.cpu.attention import PackedAttention

if TYPE_CHECKING:
    from torch import Tensor

    from src.model.packing import Layout


def sdpa(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    """torch's scaled_dot_product_attention, segment by segment: any device, any precision."""
    # One split, whose gradient is one concatenation; slices would each give one of the size of the whole.
    cuts = sorted({0, *(c for s in layout.segments for c in (s.start, s.end, s.prefix_start, s.prefix_end))})
    place = {cut: number for number, cut in enumerate(cuts)}
    sizes = [end - start for start, end in pairwise(cuts)]
    keys, values = key.split(sizes, dim=2), value.split(sizes, dim=2)
    queries = query.split([s.end - s.start for s in layout.segments], dim=2)
    outputs = []
    for s, q in zip(layout.segments, queries, strict=True):
        seen = [*range(place[s.prefix_start], place[s.prefix_end]), *range(place[s.start], place[s.end])]
        k, v = (torch.cat([pieces[i] for i in seen], dim=2) for pieces in (keys, values))
        mask = None
        if prefix := s.prefix_end - s.prefix_start:
            # Causal aligned to the bottom right: query i sees the whole prefix and itself up to i.
            mask = torch.ones(q.shape[2], k.shape[2], dtype=torch.bool, device=q.device).tril(prefix)
        grouped = q.shape[1] != k.shape[1]
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=grouped
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous()


def onednn(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    """One call for all segments, through oneDNN's products: float32 on a CPU."""
    if query.dtype != torch.float32 or query.shape[3] != value.shape[3]:
        return sdpa(query, key, value, scaling, layout)
    return PackedAttention.apply(query, key, value, layout.table, scaling or query.shape[3] ** -0.5)


def varlen(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    """torch's own variable-length kernel (FlashAttention inside): one call for all segments, 16 bit, CUDA."""
    from torch.nn.attention.varlen import varlen_attn

    q, k, v = _flat(query, key, value, layout)
    starts = layout.cu_seqlens_q, layout.cu_seqlens_k
    # torch 2.11 groups query heads by itself and has no argument for it; from 2.12 on it must be asked to.
    accepts_gqa = "enable_gqa" in inspect.signature(varlen_attn).parameters
    options: dict[str, Any] = {"enable_gqa": q.shape[1] != k.shape[1]} if accepts_gqa else {}
    # (-1, 0): causal, which with fewer queries than keys means aligned to the bottom right.
    output: Any = varlen_attn(q, k, v, *starts, *layout.longest, scale=scaling, window_size=(-1, 0), **options)
    return output[None]


def flash_attention_2(query: Tensor, key: Tensor, value: Tensor, scaling: float | None, layout: Layout) -> Tensor:
    """The same through the package flash-attn."""
    from flash_attn import flash_attn_varlen_func

    q, k, v = _flat(query, key, value, layout)
    starts = layout.cu_seqlens_q, layout.cu_seqlens_k
    # Without deterministic=True the gradient of the queries is summed in any order.
    return flash_attn_varlen_func(
        q, k, v, *starts, *layout.longest, softmax_scale=scaling, causal=True, deterministic=True
    )[None]


def _flat(query: Tensor, key: Tensor, value: Tensor, layout: Layout) -> tuple[Tensor, Tensor, Tensor]:
    """(1, heads, n, d) -> (tokens, heads, d), keys and values of every segment in a row, in the kernels' precision."""
    q, k, v = (x[0].transpose(0, 1).to(torch.bfloat16) for x in (query, key, value))
    # A position is in two segments at most, and a sum of two does not depend on their order: deterministic.
    return q, k.index_select(0, layout.keys), v.index_select(0, layout.keys)


ATTENTION_BACKENDS = {kernel.__name__: kernel for kernel in (sdpa, onednn, varlen, flash_attention_2)}


def registered_name(kernel: str) -> str:
    return f"packed_{kernel}"


def _register(name: str) -> None:
    @torch.compiler.disable  # segments differ with every batch; what is around them is worth compiling
    def packed_attention(
        module: torch.nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        layout: Layout | None = None,
        **_: Any,
    ) -> tuple[Tensor, None]:
        """Each segment attends to itself causally and to its prefix; nothing else is seen.

        query: (1, heads, n, d); key, value: (1, kv_heads, n, d). Returns (1, n, heads, d), as transformers expects.
        """
        assert layout is not None, "a packed batch passes its layout to the model"
        return ATTENTION_BACKENDS[name](query, key, value, scaling, layout), None

    AttentionInterface.register(registered_name(name), packed_attention)


for _name in ATTENTION_BACKENDS:
    _register(_name)


def resolve_backend(wanted: str, device: torch.device, precision: str) -> tuple[str, str]:
    """The kernel for model.attention=`wanted` on this device, and why. Raises ConfigError when it cannot be had."""
    missing = {
        "sdpa": None,
        "onednn": why_not_onednn(device, precision),
        "varlen": why_not_varlen(device, precision),
        "flash_attention_2": why_not_flash(device, precision),
    }
    if wanted != "auto":
        if missing[wanted]:
            raise ConfigError(f"model.attention={wanted}: {missing[wanted]}; use model.attention=auto")
        return wanted, "as configured"
    for name in ("flash_attention_2", "varlen", "onednn"):
        if missing[name] is None:
            return name, "fastest available"
    return "sdpa", "; ".join(f"no {name}: {why}" for name, why in missing.items() if why)


def why_not_onednn(device: torch.device, precision: str) -> str | None:
    if device.type != "cpu":
        return f"it is for a CPU, this is {device.type}"
    if precision != "fp32":
        return f"it computes in float32, engine.precision is {precision}"
    try:
        kernels.load()
    except kernels.NotBuiltError as error:
        return str(error)
    return None


def why_not_cuda_kernels(device: torch.device, precision: str) -> str | None:
    if device.type != "cuda":
        return f"it needs CUDA, this is {device.type}"
    if precision != "bf16":
        return f"it computes in 16 bits, engine.precision is {precision}"
    if torch.cuda.get_device_capability(device) < (8, 0):
        return f"it needs compute capability 8.0, {torch.cuda.get_device_name(device)} has less"
    return None


def why_not_varlen(device: torch.device, precision: str) -> str | None:
    found = importlib.util.find_spec("torch.nn.attention.varlen")
    return why_not_cuda_kernels(device, precision) or (None if found else f"torch {torch.__version__} has none")


def why_not_flash(device: torch.device, precision: str) -> str | None:
    found = importlib.util.find_spec("flash_attn")
    return why_not_cuda_kernels(device, precision) or (None if found else "the package flash-attn is not installed")


def check_supported(config: Any, longest: int) -> None:
    """Refuse a model whose log-probs this project would get wrong: attention that is not plain causal softmax over
    the whole sequence, or logits that are more than the head's output. longest: tokens of a sequence, in training
    or sampling. Raises ConfigError."""
    name = config.model_type
    window = getattr(config, "sliding_window", None)
    if window and getattr(config, "use_sliding_window", True) and window < longest:
        raise ConfigError(f"model {name}: its sliding window of {window} tokens is shorter than sequences of {longest}")
    positions = getattr(config, "max_position_embeddings", None)
    if positions and positions < longest:
        raise ConfigError(f"model {name}: it has {positions} positions, sequences have up to {longest} tokens")
    if getattr(config, "attn_logit_softcapping", None):
        raise ConfigError(f"model {name}: soft-capped attention scores are not supported")
    for field in ("final_logit_softcapping", "logits_scaling", "logit_scale"):
        if getattr(config, field, None) not in (None, 1, 1.0):
            raise ConfigError(
                f"model {name}: {field}={getattr(config, field)} changes logits after the head; not supported"
            )
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(f"model {name}: not a causal decoder")
