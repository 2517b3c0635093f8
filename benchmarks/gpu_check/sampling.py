"""Sampling: bytes of the cache a token, samples that an earlier attempt left, and on a card tokens a second."""

from __future__ import annotations

import random
import time
from collections.abc import Callable, Iterable
from typing import Any

import torch

from benchmarks.gpu_check.environment import synchronize
from benchmarks.gpu_check.results import Limit, Row
from benchmarks.gpu_check.setting import Setting
from benchmarks.gpu_check.shapes import llama, llama_of
from benchmarks.gpu_check.training import stage_of
from src.distributed import Share
from src.model.kv_cache import cache_in
from src.model.loading import load_template, numerics_of
from src.model.logprobs import patch_model_
from src.model.numerics import cast_for_inference_
from src.model.sampling import sample
from src.planning.identity import GenerateInputs

BYTES = "2 bytes for each number of a key and a value: float32 would fill a card at half the length"
REST = Limit(0, "a response depends on its prompt's seed, so what an attempt left undone is sampled as before")


def run(setting: Setting) -> list[Row]:
    shape, count, tokens = ("3b", 64, 256) if setting.on_card else ("tiny", 8, 12)
    model = llama_of("llama32_3b", setting.device) if setting.on_card else llama(shape, setting.device)
    stage = stage_of("generate", "setup=mini_tldr", "engine=fsdp", f"evaluation.generation.max_new_tokens={tokens}")
    assert isinstance(stage.inputs, GenerateInputs)
    numerics = numerics_of(stage.inputs.model, stage.resources)
    model = patch_model_(cast_for_inference_(model, numerics)).eval()
    template, generation = load_template(stage.inputs.model), stage.inputs.generation
    rng = random.Random(0)
    prompts = [[rng.randrange(3, 300) for _ in range(rng.randint(4, 20))] for _ in range(count)]

    def responses(done: set[int]) -> dict[int, list[int]]:
        batch = max(2, count // 4)
        drawn = sample(model, template, prompts, "seed", generation, numerics, batch_size=batch, share=Share(done=done))
        return {index: ids for index, ids, _ in drawn}

    cache = CacheMeter(model)
    everything = responses(set())
    first = set(range(count // 2))
    rest = responses(first)
    different = sum(everything[i] != rest.get(i) for i in range(count) if i not in first)
    rows = [cache_row(setting, model, cache), setting.row("responses that change when resumed", different, "", REST)]
    if setting.on_card:
        rows += speed_rows(setting, lambda: sample(model, template, prompts, "speed", generation, numerics), tokens)
    return rows


class CacheMeter:
    """Notes the bytes a token of the cache that a model returns, at its longest."""

    def __init__(self, model: Any) -> None:
        self.bytes_per_token = 0.0
        model.register_forward_hook(self.note)

    def note(self, module: Any, inputs: Any, output: Any) -> None:
        tensors = [x for layer in cache_in(output).layers for x in (layer.keys, layer.values)]
        positions = tensors[0].shape[0] * tensors[0].shape[2]  # (rows, heads, tokens, dimensions)
        self.bytes_per_token = max(self.bytes_per_token, sum(x.nbytes for x in tensors) / positions)


def cache_row(setting: Setting, model: Any, cache: CacheMeter) -> Row:
    """Return bytes a token against 2 bytes x (key and value) x heads x dimensions x layers."""
    config = model.config
    bound = 2 * 2 * config.num_key_value_heads * config.head_dim * config.num_hidden_layers
    return setting.row("cache of a token", cache.bytes_per_token, "bytes", Limit(bound, BYTES))


def speed_rows(setting: Setting, draw: Callable[[], Iterable[tuple[int, list[int], bool]]], limit: int) -> list[Row]:
    """Return tokens a second and the peak of memory for all prompts in one batch."""
    torch.cuda.reset_peak_memory_stats()
    synchronize()
    started = time.perf_counter()
    lengths = [len(ids) for _, ids, _ in draw()]
    synchronize()
    rate = sum(lengths) / (time.perf_counter() - started)
    peak = torch.cuda.max_memory_allocated() / 2**30
    note = f"{len(lengths)} prompts, up to {limit} tokens"
    return [setting.row("3B: sampled tokens", rate, "tokens/s", note=note), setting.row("3B: peak", peak, "GiB")]
