"""Sampling whose outcome for a prompt depends on the prompt's own seed alone, not on what shares its batch."""

from __future__ import annotations

import hashlib
from collections.abc import Container, Iterator, Sequence
from typing import TYPE_CHECKING, Any

import torch
from transformers import (
    GenerationConfig,
    LogitsProcessor,
    LogitsProcessorList,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from src.data.templates import Template
from src.model.logprobs import FLOAT32, NumericsConfig
from src.planning.identity import GenerationInputs

if TYPE_CHECKING:
    from torch import Tensor


class _Draw(LogitsProcessor):
    """Warps the logits as configured, then draws by inverse CDF from one uniform per prompt and step, leaving
    only the drawn token possible. Exact sampling, with the randomness in our hands."""

    def __init__(self, generation: GenerationInputs, uniforms: Tensor, prompt_length: int) -> None:
        warpers: list[LogitsProcessor] = []
        if generation.temperature not in (0.0, 1.0):
            warpers.append(TemperatureLogitsWarper(generation.temperature))
        if generation.top_k:
            warpers.append(TopKLogitsWarper(generation.top_k))
        if generation.top_p < 1.0:
            warpers.append(TopPLogitsWarper(generation.top_p))
        self.warpers = LogitsProcessorList(warpers)
        self.greedy = generation.temperature == 0.0
        self.uniforms, self.prompt_length = uniforms, prompt_length

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:
        if self.greedy:
            return scores
        step = input_ids.shape[1] - self.prompt_length
        cumulative = self.warpers(input_ids, scores.float()).softmax(-1).double().cumsum(-1)
        drawn = torch.searchsorted(cumulative, self.uniforms[:, step, None] * cumulative[:, -1:], right=True)
        return torch.full_like(scores, -torch.inf).scatter_(1, drawn.clamp(max=scores.shape[1] - 1), 0.0)


def seed_from_str(seed: str) -> int:
    """63 bits."""
    return int.from_bytes(hashlib.sha256(seed.encode()).digest()[:8], "big") >> 1


def _uniforms(seeds: Sequence[str], steps: int, device: torch.device) -> Tensor:
    """(prompts, steps) float64 in [0, 1), each row from its own seed."""
    rows = []
    for seed in seeds:
        generator = torch.Generator().manual_seed(seed_from_str(seed))
        rows.append(torch.rand(steps, generator=generator, dtype=torch.float64))
    return torch.stack(rows).to(device)


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
    done: Container[int] = (),
) -> Iterator[tuple[int, list[int], bool]]:
    """Yields (index, response ids, finished) of every prompt; the end token is part of a finished response. Batches of
    which every prompt is `done` are left out, so that the others are the same as without."""
    model.eval()
    model.set_attn_implementation("sdpa")
    # What its own says would fill whatever ours leaves open (a repetition penalty, say), unseen by any config.
    model.generation_config = GenerationConfig()
    device = next(model.parameters()).device
    pad = template.end_id
    config = GenerationConfig(
        max_new_tokens=generation.max_new_tokens,
        do_sample=False,
        eos_token_id=template.end_id,
        pad_token_id=pad,
        bos_token_id=template.tokenizer.bos_token_id,
        use_cache=True,
    )
    # Alike in length, so that little is padding; the order cannot matter to the outcome.
    order = sorted(range(len(prompts)), key=lambda i: (len(prompts[i]), i))
    for begin in range(0, len(order), batch_size):
        indices = order[begin : begin + batch_size]
        if all(i in done for i in indices):
            continue
        longest = max(len(prompts[i]) for i in indices)
        ids = torch.full((len(indices), longest), pad)
        mask = torch.zeros_like(ids)
        for row, i in enumerate(indices):
            ids[row, longest - len(prompts[i]) :] = torch.tensor(prompts[i])
            mask[row, longest - len(prompts[i]) :] = 1
        uniforms = _uniforms([f"{seed}/{i}" for i in indices], generation.max_new_tokens, device)
        draw = _Draw(generation, uniforms, longest)
        with numerics.autocast(device):
            output = model.generate(
                input_ids=ids.to(device),
                attention_mask=mask.to(device),
                generation_config=config,
                logits_processor=LogitsProcessorList([draw]),
            )
        for i, response in zip(indices, output[:, longest:].tolist(), strict=True):
            finished = template.end_id in response
            yield i, response[: response.index(template.end_id) + 1] if finished else response, finished
