"""Scoring and sampling on fake CUDA tensors: a pass over examples, and one batch of samples at its full length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from src.data.examples import Example
from src.model import sampling
from src.model.kv_cache import cache_in
from src.model.loading import numerics_of
from src.model.logprobs import SCORING_TOKEN_BUDGET, iter_kl, iter_logps, patch_model_
from src.model.numerics import cast_for_inference_
from src.model.sampling import sample
from src.planning.identity import GenerationInputs
from src.rehearsal.device import FakeCudaMode
from src.rehearsal.models import config_of, load_fake, template
from src.rehearsal.request import Request
from src.rehearsal.training import TOKEN, Notes, copies_of_longest, examples_of, model_inputs, resources_of

# Tokens that are sampled for real: the first from the prompt, others with a cache of the prompt's length, and after a
# jump others with a cache of almost the full length, which have allocated all that a step allocates.
SHORT_STEPS, LONG_STEPS = 3, 3


def load_for_inference(request: Request, mode: FakeCudaMode, layers: int | None) -> Any:
    """Do what `src.model.loading.load_for_inference` does, with a model that has no values."""
    numerics = numerics_of(model_inputs(request), resources_of(request))
    model = cast_for_inference_(load_fake(config_of(request.config, layers), mode), numerics)
    return patch_model_(model.to("cuda"), torch.device("cuda"))


def rehearse_reference(request: Request, mode: FakeCudaMode, layers: int | None, notes: Notes) -> None:
    """Score all examples under one model, after micro-batches of the longest."""
    model = load_for_inference(request, mode, layers)
    _note_model(notes, "weights", model)
    examples = examples_of(request)
    numerics = numerics_of(model_inputs(request), resources_of(request))
    budget = request.max_tokens_per_micro_batch or SCORING_TOKEN_BUDGET
    with mode.in_phase("score"):
        if request.longest:
            for _ in iter_logps(model, [examples.pop()] * copies_of_longest(request, budget), budget, numerics):
                pass
            mode.work.reset()
        for indices, *_ in iter_logps(model, examples, budget, numerics):
            notes.micro_batches += 1
            notes.tokens += sum(examples[i].length for i in indices)
            notes.supervised_tokens += sum(examples[i].num_supervised_tokens for i in indices)


def rehearse_candidates(request: Request, mode: FakeCudaMode, layers: int | None, notes: Notes) -> None:
    """Sample one batch, whose longest prompt and response are the request's."""
    _rehearse_sampling(request, mode, layers, notes)


def rehearse_generate(request: Request, mode: FakeCudaMode, layers: int | None, notes: Notes) -> None:
    """Sample one batch like `rehearse_candidates`; then score it under two models."""
    model = _rehearse_sampling(request, mode, layers, notes)
    numerics = numerics_of(model_inputs(request), resources_of(request))
    initial = load_for_inference(request, mode, layers)
    _note_model(notes, "reference_weights", initial)
    examples = [Example((TOKEN,) * request.prompt_tokens, ((TOKEN,) * request.new_tokens,))] * request.rows
    notes.supervised_tokens = sum(example.num_supervised_tokens for example in examples)
    with mode.in_phase("score"):
        for _ in iter_kl(model, initial, examples, request.max_tokens_per_micro_batch, numerics):
            pass


def _rehearse_sampling(request: Request, mode: FakeCudaMode, layers: int | None, notes: Notes) -> Any:
    """Sample one batch and return the model."""
    model = load_for_inference(request, mode, layers)
    _note_model(notes, "weights", model)
    numerics = numerics_of(model_inputs(request), resources_of(request))
    generation = GenerationInputs(0.9, 40, 1.0, request.new_tokens, 0, None)
    prompts = [[TOKEN] * request.prompt_tokens] * request.rows
    with mode.in_phase("sample"), _shortened(model, mode, request, notes), _parts_of_whole_depth(request, mode):
        for _ in sample(model, template(), prompts, "0", generation, numerics, batch_size=request.rows):
            notes.tokens += request.new_tokens
    torch.cuda.empty_cache()
    return model


def _note_model(notes: Notes, name: str, model: Any) -> None:
    parameters = list(model.parameters())
    notes.parameters = sum(p.numel() for p in parameters)
    notes.held[name] = sum(p.numel() * p.element_size() for p in parameters)


@contextlib.contextmanager
def _parts_of_whole_depth(request: Request, mode: FakeCudaMode) -> Iterator[None]:
    """Let a batch be split as it is with all layers, whose weights and cache leave less memory than a few layers'."""
    split, depth = sampling.parts_that_fit, request.config["num_hidden_layers"]
    whole = load_fake(config_of(request.config), mode)
    size = 2 if request.precision == "bf16" else 4
    free = mode.gpu.usable - size * sum(p.numel() for p in whole.parameters())

    def split_noted(batch: Any, model: Any, *lengths: int) -> Any:
        with (
            mock.patch.object(model.config, "num_hidden_layers", depth),
            mock.patch.object(torch.cuda, "mem_get_info", lambda *_: (free, mode.gpu.memory)),
        ):
            return split(batch, model, *lengths)

    with mock.patch.object(sampling, "parts_that_fit", split_noted):
        yield


@contextlib.contextmanager
def _shortened(model: Any, mode: FakeCudaMode, request: Request, notes: Notes) -> Iterator[None]:
    """Of every part of a batch compute the first SHORT_STEPS tokens and the last LONG_STEPS.

    The work of those in between is that of the mean of the steps around them. `micro_batches` counts the parts.
    """
    generate, update = model.generate, model._update_model_kwargs_for_generation
    jump = max(0, request.new_tokens - SHORT_STEPS - LONG_STEPS)
    marks: list[dict[str, list[float]]] = []  # the work until the end of each step of a part

    def generate_noted(*args: Any, **kwargs: Any) -> Any:
        marks.clear()
        notes.micro_batches += 1
        with mode.in_phase("prompt"):
            output = generate(*args, **kwargs)
        if jump:
            short, long = _between(marks[0], marks[1]), _between(marks[-2], marks[-1])
            for kind, row in mode.work.by_kind.items():
                mean = [(a + b) / 2 for a, b in zip(short.get(kind, [0.0] * 4), long.get(kind, [0.0] * 4), strict=True)]
                mode.work.by_kind[kind] = [a + jump * b for a, b in zip(row, mean, strict=True)]
        return output

    def update_noted(outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        model_kwargs = update(outputs, model_kwargs, *args, **kwargs)
        layers = cache_in(model_kwargs).layers
        marks.append({kind: list(row) for kind, row in mode.work.by_kind.items()})
        mode.phase = "decode"  # whose peak grows with the cache of all layers, that of the prompt hardly
        if len(marks) == SHORT_STEPS and jump:
            for layer in layers:
                layer.update(*(_tokens_like(x, jump) for x in (layer.keys, layer.values)))
            mode.work.by_kind = {kind: list(row) for kind, row in marks[-1].items()}  # that is no step's work
            mask = model_kwargs["attention_mask"]
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), jump)], 1)
        _note_cache([x for layer in layers for x in (layer.keys, layer.values)], request, mode, notes)
        return model_kwargs

    # The model asks the device whether all rows have ended, which has no answer.
    with (
        mock.patch.object(model, "generate", generate_noted),
        mock.patch.object(model, "_update_model_kwargs_for_generation", update_noted),
        mock.patch.object(model, "_has_unfinished_sequences", lambda *_, **__: len(marks) + jump < request.new_tokens),
    ):
        yield


def _note_cache(tensors: list[Tensor], request: Request, mode: FakeCudaMode, notes: Notes) -> None:
    mode.memory.relabel(tensors, "KV cache")
    notes.held["kv_cache"] = sum(x.numel() * x.element_size() for x in tensors)
    expected = torch.bfloat16 if request.precision == "bf16" else torch.float32
    if wrong := {str(x.dtype).removeprefix("torch.") for x in tensors if x.dtype != expected}:
        names = ", ".join(sorted(wrong))
        notes.finding = f"the KV cache holds {names}, with engine.precision={request.precision}: src/model/sampling.py"


def _tokens_like(x: Tensor, count: int) -> Tensor:
    """Return keys or values of so many tokens; x: (rows, heads, n, d)."""
    return x.new_empty(*x.shape[:2], count, x.shape[3])


def _between(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, list[float]]:
    return {kind: [b - a for a, b in zip(first.get(kind, [0.0] * 4), row, strict=True)] for kind, row in second.items()}
