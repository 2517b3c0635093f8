"""Sampling in which a prompt's response depends on the prompt's own seed, not on the other prompts of its batch.

transformers draws from one random stream per batch, so its samples change with the batch size.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import transformers
from torch import Tensor
from transformers import GenerationConfig, LogitsProcessor, LogitsProcessorList

from src.data.templates import Template
from src.distributed import EVERYTHING, Share
from src.model.fused import set_fused_
from src.model.kv_cache import bf16_cache
from src.model.numerics import FLOAT32, NumericsConfig
from src.model.sampling_memory import parts_that_fit
from src.planning.identity import GenerationInputs


class _InverseCDFSampler(LogitsProcessor):
    """Draws the next token by inverse CDF from one uniform number per prompt and step, after the configured warpers.

    All other tokens get a logit of -inf, so that greedy decoding takes the drawn one.
    """

    def __init__(self, generation: GenerationInputs, uniforms: Tensor, prompt_length: int) -> None:
        self.warpers = LogitsProcessorList()
        if generation.temperature != 1.0:
            self.warpers.append(transformers.TemperatureLogitsWarper(generation.temperature))
        if generation.top_k:
            self.warpers.append(transformers.TopKLogitsWarper(generation.top_k))
        if generation.top_p < 1.0:
            self.warpers.append(transformers.TopPLogitsWarper(generation.top_p))
        self.uniforms, self.prompt_length = uniforms, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        step = input_ids.shape[1] - self.prompt_length
        cumulative = self.warpers(input_ids, scores.float()).softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(cumulative, self.uniforms[:, step, None] * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.clamp(max=scores.shape[1] - 1), 0.0)


def seed_from_str(seed: str) -> int:
    """Return 63 bits of the SHA-256 of `seed`."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1


def seed_of(seed: str, index: int, generation: GenerationInputs) -> str:
    """Return the seed of a response, from that of all of them.

    index: of its prompt, where each prompt stands samples_per_prompt times in succession. The first sample of a prompt
    does not depend on how many more there are.
    """
    prompt, number = divmod(index, generation.samples_per_prompt)
    return f"{seed}/{prompt}/{number}" if number else f"{seed}/{prompt}"


def _uniforms(seeds: Sequence[str], steps: int, device: torch.device) -> Tensor:
    """Return (prompts, steps) float64 in [0, 1), each row from its own seed."""
    generators = (torch.Generator().manual_seed(seed_from_str(seed)) for seed in seeds)
    return torch.stack([torch.rand(steps, generator=g, dtype=torch.float64) for g in generators]).to(device)


def _parts(
    batch: Sequence[int],
    model: Any,
    prompts: Sequence[list[int]],
    generation: GenerationInputs,
    share: Share,
) -> Iterator[Sequence[int]]:
    """Yield the parts of a batch that are sampled at once, but those whose prompts are all done."""
    longest = max(len(prompts[i]) for i in batch)
    for part in parts_that_fit(batch, model, longest, generation.max_new_tokens):
        if not share.is_done(part):
            yield part


@torch.no_grad()
def sample(
    model: Any,
    template: Template,
    prompts: Sequence[list[int]],
    seed: str,
    generation: GenerationInputs,
    numerics: NumericsConfig = FLOAT32,
    *,
    batch_size: int = 64,
    share: Share = EVERYTHING,
    only: Sequence[int] | None = None,
) -> Iterator[tuple[int, list[int], bool]]:
    """Yield (index, response ids, finished) for every prompt of the share's batches.

    prompts: each generation.samples_per_prompt times in succession. only: the indices of those to sample; None: all.
    A finished response includes its end token. On a GPU a batch that might not fit into memory is sampled in parts.
    """
    model.eval()
    model.set_attn_implementation("sdpa")
    set_fused_(model, numerics.fused)
    # The checkpoint's generation_config would set what ours leaves open (a repetition penalty, for example).
    model.generation_config = GenerationConfig()
    device = next(model.parameters()).device
    begin_id, end_id, end_ids = template.tokenizer.bos_token_id, template.end_id, [*template.end_ids]
    tokens = {"bos_token_id": begin_id, "eos_token_id": end_ids, "pad_token_id": end_id}
    config = GenerationConfig(max_new_tokens=generation.max_new_tokens, do_sample=False, **tokens)
    # Sorted by length, so that there is little padding; samples do not depend on the order.
    order = sorted(range(len(prompts)) if only is None else only, key=lambda i: (len(prompts[i]), i))
    batches = [order[begin : begin + batch_size] for begin in range(0, len(order), batch_size)]
    for indices in (part for batch in share.of(batches) for part in _parts(batch, model, prompts, generation, share)):
        prompt_length = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), prompt_length), end_id)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, prompt_length - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, prompt_length - len(prompts[i]) :] = 1
        processors = LogitsProcessorList()
        if generation.temperature > 0.0:
            uniforms = _uniforms([seed_of(seed, i, generation) for i in indices], generation.max_new_tokens, device)
            processors.append(_InverseCDFSampler(generation, uniforms, prompt_length))
        cache = {"past_key_values": bf16_cache()} if numerics.precision == "bf16" else {}
        with numerics.autocast(device):
            output = model.generate(
                ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=processors,
                **cache,
            )
        del cache  # before the next batch has one
        for i, response in zip(indices, output[:, prompt_length:].tolist(), strict=True):
            ended = next((n for n, token in enumerate(response, 1) if token in end_ids), None)
            yield i, response[:ended], ended is not None
