"""A small random Qwen2 with a tokenizer in the layout of Qwen2.5's base models, and conversations of several turns."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from tokenizers import AddedToken
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from tests.support import tiny_llama

# As Qwen2.5's, without its parts for tools: a system message of its own where the conversation has none.
CHAT_TEMPLATE = """{%- if messages[0]['role'] != 'system' %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a byte-level BPE that has ChatML's tokens, ends a text with another one, and has no begin token."""
    bpe = tiny_llama.byte_level_bpe(["<|endoftext|>", "<|im_start|>", "<|im_end|>"])
    fast = PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|endoftext|>", pad_token="<|endoftext|>")
    fast.add_tokens([AddedToken("<think>", special=False)])
    fast.chat_template = CHAT_TEMPLATE
    return fast


def model(folder: Path) -> Path:
    """Write a random model of two layers with its tokenizer; return the folder."""
    fast = tokenizer()
    fast.save_pretrained(folder)
    torch.manual_seed(0)
    config = Qwen2Config(
        vocab_size=len(fast),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        tie_word_embeddings=True,
        eos_token_id=fast.eos_token_id,
    )
    Qwen2ForCausalLM(config).save_pretrained(folder)
    return folder


def conversations(file: Path, count: int = 12) -> Path:
    """Write pairs of answers to conversations of two turns, as JSON lines."""
    rows = [
        {
            "conversations": [
                {"role": "system", "content": "Be brief."},
                {"role": "user", "content": f"the cat {n}"},
                {"role": "assistant", "content": "sat"},
                {"role": "user", "content": "why"},
            ],
            "chosen": f"the dog ran {n}",
            "rejected": "how big",
        }
        for n in range(count)
    ]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file
