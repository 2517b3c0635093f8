"""Scoring and sampling on fake CUDA tensors: a pass over examples, and one batch of samples at its full length."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from src.data.examples import Example
from src.model.loading import numerics_of
from src.model.logprobs import iter_kl, iter_logps, patch_model_
from src.model.numerics import cast_for_inference_
from src.model.sampling import sample
from src.planning.identity import GenerationInputs
from src.rehearsal.device import FakeCudaMode
from src.rehearsal.models import config_of, load_fake, template
from src.rehearsal.request import Request
from src.rehearsal.training import TOKEN, Notes, examples_of, model_inputs, resources_of

# Tokens that are sampled for real: the first from the prompt, others with a cache of the prompt's length, and after a
# jump others with a cache of almost the full length, which have allocated all that a step allocates.
SHORT_STEPS, LONG_STEPS = 3, 3


def load_for_inference(request: Request, mode: FakeCudaMode, layers: int | None) -> Any:
    """Do what `src.model.loading.load_for_inference` does, with a model that has no values."""
    numerics = numerics_of(model_inputs(request), resources_of(request))
    model = cast_for_inference_(load_fake(config_of(request.config, layers), mode), numerics)
    return patch_model_(model.to("cuda"), torch.device("cuda"))


def rehearse_reference(request: Request, mode: FakeCudaMode, layers: int | None, notes: Notes) -> None:
    """Score all examples under one model."""
    model = load_for_inference(request, mode, layers)
    _note_model(notes, "weights", model)
    examples = examples_of(request)
    numerics = numerics_of(model_inputs(request), resources_of(request))
    with mode.in_phase("score"):
        for indices, *_ in iter_logps(model, examples, request.max_tokens_per_micro_batch, numerics):
            notes.micro_batches += 1
            notes.tokens += sum(examples[i].length for i in indices)
            notes.supervised_tokens += sum(examples[i].num_supervised_tokens for i in indices)


def rehearse_generate(request: Request, mode: FakeCudaMode, layers: int | None, notes: Notes) -> None:
    """Sample one batch, whose longest prompt and response are the request's; then score it under two models."""
    model = load_for_inference(request, mode, layers)
    _note_model(notes, "weights", model)
    numerics = numerics_of(model_inputs(request), resources_of(request))
    steps = min(request.new_tokens, SHORT_STEPS + LONG_STEPS)
    jump = request.new_tokens - steps
    generation = GenerationInputs(0.9, 40, 1.0, steps, 0, None)
    prompts = [[TOKEN] * request.prompt_tokens] * request.rows
    with mode.in_phase("sample"), _jumping(model, mode, steps, jump, request, notes):
        for _, ids, _ in sample(model, template(), prompts, "0", generation, numerics, batch_size=request.rows):
            notes.tokens += len(ids) + jump
    torch.cuda.empty_cache()
    initial = load_for_inference(request, mode, layers)
    _note_model(notes, "reference_weights", initial)
    examples = [Example((TOKEN,) * request.prompt_tokens, ((TOKEN,) * request.new_tokens,))] * request.rows
    notes.supervised_tokens = sum(example.num_supervised_tokens for example in examples)
    with mode.in_phase("score"):
        for _ in iter_kl(model, initial, examples, request.max_tokens_per_micro_batch, numerics):
            notes.micro_batches += 1


def _note_model(notes: Notes, name: str, model: Any) -> None:
    parameters = list(model.parameters())
    notes.parameters = sum(p.numel() for p in parameters)
    notes.held[name] = sum(p.numel() * p.element_size() for p in parameters)


@contextlib.contextmanager
def _jumping(model: Any, mode: FakeCudaMode, steps: int, jump: int, request: Request, notes: Notes) -> Iterator[None]:
    """After SHORT_STEPS tokens let the cache be longer by `jump` positions, as if so many had been sampled.

    The work of the steps in between is that of the mean of the steps before and after the jump.
    """
    update, step = model._update_model_kwargs_for_generation, 0
    marks: list[dict[str, list[float]]] = []

    def update_noted(outputs: Any, model_kwargs: dict[str, Any], *args: Any, **kwargs: Any) -> dict[str, Any]:
        nonlocal step
        step += 1
        model_kwargs = update(outputs, model_kwargs, *args, **kwargs)
        layers = model_kwargs["past_key_values"].layers
        marks.append({kind: list(row) for kind, row in mode.work.by_kind.items()})
        if step == SHORT_STEPS and jump > 0:
            for layer in layers:
                layer.update(*(_tokens_like(x, jump) for x in (layer.keys, layer.values)))
            mode.work.by_kind = {kind: list(row) for kind, row in marks[-1].items()}  # the jump is no work
            mask = model_kwargs["attention_mask"]
            model_kwargs["attention_mask"] = torch.cat([mask, mask.new_ones(len(mask), jump)], 1)
        held = [x for layer in layers for x in (layer.keys, layer.values)]
        mode.memory.relabel(held, "KV cache")
        notes.held["kv_cache"] = sum(x.numel() * x.element_size() for x in held)
        expected = torch.bfloat16 if request.precision == "bf16" else torch.float32
        if wrong := {str(x.dtype).removeprefix("torch.") for x in held if x.dtype != expected}:
            notes.finding = (
                f"the KV cache holds {', '.join(sorted(wrong))}, with engine.precision={request.precision}: "
                "src/model/sampling.py"
            )
        return model_kwargs

    # The model asks the device whether all rows have ended, which has no answer.
    with (
        mock.patch.object(model, "_update_model_kwargs_for_generation", update_noted),
        mock.patch.object(model, "_has_unfinished_sequences", lambda *_, **__: step < steps),
    ):
        yield
    if jump > 0 and len(marks) > SHORT_STEPS + 1:
        short, long = _between(marks[0], marks[1]), _between(marks[-2], marks[-1])
        for kind in short.keys() | long.keys():
            mean = [(a + b) / 2 for a, b in zip(short.get(kind, [0.0] * 4), long.get(kind, [0.0] * 4), strict=True)]
            row = mode.work.by_kind.setdefault(kind, [0.0] * 4)
            mode.work.by_kind[kind] = [a + jump * b for a, b in zip(row, mean, strict=True)]


def _tokens_like(x: Tensor, count: int) -> Tensor:
    """Return keys or values of so many tokens; x: (rows, heads, n, d)."""
    return x.new_empty(*x.shape[:2], count, x.shape[3])


def _between(first: dict[str, list[float]], second: dict[str, list[float]]) -> dict[str, list[float]]:
    return {kind: [b - a for a, b in zip(first.get(kind, [0.0] * 4), row, strict=True)] for kind, row in second.items()}
