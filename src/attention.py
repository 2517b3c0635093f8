"""Attention over a packed, shared-prefix batch, registered with transformers as `packed`."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from transformers import AttentionInterface

from src.config import ConfigError

if TYPE_CHECKING:
    from torch import Tensor

    from src.pairs import Segment

NAME = "packed"


def packed_attention(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    segments: tuple[Segment, ...] = (),
    **_: Any,
) -> tuple[Tensor, None]:
    """Each segment attends to itself causally and to its prefix; nothing else is seen.

    query: (1, heads, n, d); key, value: (1, kv_heads, n, d). Returns (1, n, heads, d), as transformers expects.
    """
    assert segments, "a packed batch passes its segments to the model"
    outputs = []
    for s in segments:
        q, k, v = (x[:, :, s.start : s.end] for x in (query, key, value))
        mask = None
        if s.prefix_end > s.prefix_start:
            prefix = s.prefix_end - s.prefix_start
            k = torch.cat([key[:, :, s.prefix_start : s.prefix_end], k], dim=2)
            v = torch.cat([value[:, :, s.prefix_start : s.prefix_end], v], dim=2)
            # Causal aligned to the bottom right: query i sees the whole prefix and itself up to i.
            mask = torch.ones(s.end - s.start, prefix + s.end - s.start, dtype=torch.bool, device=q.device).tril(prefix)
        outputs.append(
            F.scaled_dot_product_attention(
                q, k, v, attn_mask=mask, is_causal=mask is None, scale=scaling, enable_gqa=q.shape[1] != k.shape[1]
            )
        )
    return torch.cat(outputs, dim=2).transpose(1, 2).contiguous(), None


AttentionInterface.register(NAME, packed_attention)


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
