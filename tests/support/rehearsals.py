"""Requests for rehearsals of a tiny Llama. No torch."""

from __future__ import annotations

from dataclasses import replace

from src.rehearsal.request import Request, draw_lengths, longest_lengths

TINY = {
    "model_type": "llama",
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 160,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}
NUM_PARAMETERS = 512 * 64 + 64 + 2 * (2 * 64 + 64 * 64 * 2 + 2 * 64 * 32 + 3 * 64 * 160)

PAIRS = draw_lengths(4, 20, 12, 2, max_tokens=64, max_prompt_tokens=48)
LONGEST = longest_lengths(20, 2, max_tokens=64, max_prompt_tokens=48)
TINY_REQUEST = Request(
    "align",
    TINY,
    "h100",
    PAIRS,
    LONGEST,
    strategy="fsdp",
    attention="varlen",
    activation_checkpointing="false",
    batch_size=4,
    max_tokens_per_micro_batch=150,
)
GENERATE = Request("generate", TINY, "h100", rows=4, prompt_tokens=20, new_tokens=40)
LORA = {"rank": 4, "alpha": 8.0, "targets": None}

# attention, precision, checkpointing, LoRA, fused kernels. float32 has one backend; with it the engine is `none`.
PAIRWISE = (
    ("varlen", "bf16", True, True, True),
    ("varlen", "bf16", False, False, False),
    ("flash_attention_2", "bf16", True, False, True),
    ("flash_attention_2", "bf16", False, True, False),
    ("sdpa", "bf16", True, False, False),
    ("sdpa", "bf16", False, True, True),
    ("sdpa", "fp32", True, True, False),
    ("sdpa", "fp32", False, False, True),
)


def combined(attention: str, precision: str, checkpointing: bool, lora: bool, fused: bool) -> Request:
    return replace(
        TINY_REQUEST,
        attention=attention,
        precision=precision,
        strategy="fsdp" if precision == "bf16" else "none",
        activation_checkpointing=str(checkpointing).lower(),
        lora=LORA if lora else None,
        fused_kernels=str(fused).lower(),
    )
