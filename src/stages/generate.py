"""Samples of a checkpoint for the held-out prompts, with their log-probs under it and under what it started from."""

from __future__ import annotations

import contextlib
import json
import logging
import time
from pathlib import Path
from typing import Any

from src.data.evaluation_prompts import read_prompts
from src.data.examples import Example
from src.data.templates import Template
from src.hardware import release_accelerator
from src.model.adapters import is_adapter
from src.model.loading import load_for_inference, load_template, load_weights, numerics_of, save_checkpoint
from src.model.logprobs import iter_kl
from src.model.sampling import sample
from src.planning.identity import GenerateInputs
from src.planning.resources import Resources
from src.serving.model_server import sample_through, served_folder, serving
from src.store.attempt import Attempt
from src.store.files import has_valid_checksum, read_jsonl, remove, with_checksum, write_jsonl
from src.store.store import SAMPLES_FILE

log = logging.getLogger(__name__)

RESPONSES_FILE = "responses.jsonl"  # among the checkpoints: the responses sampled so far


def read(folder: Path) -> list[dict[str, Any]]:
    """Return one row per prompt: index, prompt, response, finished, tokens, logp, reference_logp, kl.

    All three of `src.model.logprobs.sequence_kl`: summed over the response, in nats, at temperature 1.
    """
    return list(read_jsonl(folder / SAMPLES_FILE))


def run(inputs: GenerateInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    prompts = [entry.prompt for entry in read_prompts(inputs.prompts, resources.expected_rows)]
    numbered = [(i, template.prompt_ids(p)) for i, p in enumerate(prompts)]
    limit = inputs.prompts.data.max_prompt_tokens
    # Without any token, not even a begin token, there is no position that predicts the first response token.
    rows = [(i, ids[-limit:]) for i, ids in numbered if ids]
    if len(rows) < len(prompts):
        log.warning("%s: dropped %d of %d prompts: empty", attempt.label, len(prompts) - len(rows), len(prompts))
    if longer := sum(len(ids) > limit for _, ids in numbered):
        log.warning("%s: %d of %d prompts are cut to their last %d tokens", attempt.label, longer, len(prompts), limit)
    prompt_ids = [ids for _, ids in rows]
    # Policy and baseline have different seeds, so that their samples are independent; all policies of a grid have the
    # same, so that points are compared on common random numbers.
    seed = f"{inputs.seed}/{inputs.generation.seed}/{inputs.role}"

    def load(checkpoint: str) -> Any:
        return load_for_inference(inputs.model, resources, upstream.get(checkpoint), upstream.get("reference"))

    count = len(rows)
    release_accelerator()  # of what earlier stages of this process held: the cache of keys and values needs it
    model = load("checkpoint") if inputs.generation.server is None else None
    sampled = model or _whole_model(inputs, resources, upstream, template, attempt)
    responses = _sample(inputs, resources, sampled, template, prompt_ids, seed, attempt)
    release_accelerator()  # of that cache: scoring needs the memory for a second model
    model = model or load("checkpoint")  # after the server has released the accelerator
    examples = [Example(tuple(prompt_ids[i]), (tuple(responses[i]["ids"]),)) for i in range(count)]
    initial = load("reference") if inputs.role == "policy" else model  # a baseline is its own reference
    scores = _scores(inputs, resources, model, initial, examples)
    attempt.step(2 * count, 2 * count)

    samples = (
        {
            "index": number,
            "prompt": prompts[number].text,
            "response": template.text(responses[i]["ids"]),
            "finished": responses[i]["finished"],
            "tokens": len(responses[i]["ids"]),
            **scores[i],
        }
        for i, (number, _) in enumerate(rows)
    )
    write_jsonl(attempt.out / SAMPLES_FILE, samples)


def _whole_model(
    inputs: GenerateInputs, resources: Resources, upstream: dict[str, Path], template: Template, attempt: Attempt
) -> Path:
    """Return the folder of the checkpoint for a server: that of adapters as a model they are merged into.

    Servers differ in how they compute with adapters, if they can; merged ones are what is scored.
    """
    checkpoint, folder = upstream["checkpoint"], attempt.checkpoints / "merged"
    if not is_adapter(checkpoint):
        return checkpoint
    remove(folder)  # of an earlier attempt
    merged = load_weights(inputs.model, resources, checkpoint, upstream.get("reference"))
    save_checkpoint(merged, template, folder)
    return folder


def _sample(
    inputs: GenerateInputs,
    resources: Resources,
    model: Any,
    template: Template,
    prompt_ids: list[list[int]],
    seed: str,
    attempt: Attempt,
) -> dict[int, dict[str, Any]]:
    """Return a row for every prompt: the `ids` of its response, and whether it `finished`.

    Each is written to disk at once, so that the next attempt resumes. model: a checkpoint's folder with a server.
    """
    file = attempt.checkpoints / RESPONSES_FILE
    responses = {row["index"]: row for row in _read_responses(file)}
    if responses:
        log.info("%s: %d of %d prompts were sampled before", attempt.label, len(responses), len(prompt_ids))
        attempt.prior_seconds = max(row["seconds"] for row in responses.values())
        attempt.tokens = sum(len(row["ids"]) for row in responses.values())
    started, tokens_before = time.perf_counter(), attempt.tokens
    generation, numerics = inputs.generation, numerics_of(inputs.model, resources)
    with file.open("a", encoding="utf-8") as handle:

        def save_response(index: int, response: tuple[list[int], bool]) -> None:
            if index not in responses:  # a batch may have some responses from an earlier attempt
                ids, finished = response
                row = {"index": index, "ids": ids, "finished": finished, "seconds": round(attempt.seconds, 3)}
                handle.write(json.dumps(with_checksum(row)) + "\n")
                handle.flush()
                attempt.tokens += len(ids)
                responses[index] = row

        def report_progress() -> None:
            attempt.step(len(responses), 2 * len(prompt_ids))

        if generation.server is None:
            batch_size, done = resources.sampling_batch_size, set(responses)
            samples = sample(model, template, prompt_ids, seed, generation, numerics, batch_size=batch_size, done=done)
            for index, ids, finished in samples:
                save_response(index, (ids, finished))
                report_progress()
        elif todo := {i: ids for i, ids in enumerate(prompt_ids) if i not in responses}:
            folder = served_folder(model, attempt.checkpoints, template, generation)
            release_accelerator()  # a server allocates the memory that is free when it starts
            _, command = generation.server
            precision, timeout = inputs.model.precision, resources.server_timeout
            with serving(command, timeout, folder, precision, attempt.checkpoints, report_progress) as url:
                concurrency = resources.server_concurrency
                sample_through(
                    url, concurrency, str(folder), template, todo, seed, generation, save_response, report_progress
                )
    if attempt.tokens > tokens_before:
        tokens_per_second = (attempt.tokens - tokens_before) / (time.perf_counter() - started)
        log.info("%s: %.0f tokens/s", attempt.label, tokens_per_second)
    return responses


def _read_responses(file: Path) -> list[dict[str, Any]]:
    """Return the rows of earlier attempts; remove damaged ones, such as a last line that a kill has cut off."""
    rows: list[dict[str, Any]] = []
    if not file.is_file():
        remove(file)  # a folder or a named pipe in its place
    lines = file.read_bytes().split(b"\n") if file.exists() else []
    for line in filter(None, lines):
        with contextlib.suppress(ValueError, RecursionError):
            row = json.loads(line)
            if isinstance(row, dict) and has_valid_checksum(row):
                rows.append(row)
    if num_damaged := sum(map(bool, lines)) - len(rows):
        log.warning("%s: %d damaged lines; those prompts are sampled again", file, num_damaged)
    write_jsonl(file, rows)
    return rows


def _scores(
    inputs: GenerateInputs, resources: Resources, model: Any, initial: Any, examples: list[Example]
) -> dict[int, dict[str, float]]:
    """Return logp, reference_logp and kl of every response."""
    numerics, budget = numerics_of(inputs.model, resources), resources.max_tokens_per_micro_batch
    names = ("logp", "reference_logp", "kl")
    scores: dict[int, dict[str, float]] = {}
    for indices, *columns in iter_kl(model, initial, examples, budget, numerics):
        rows = zip(*(column.tolist() for column in columns), strict=True)
        scores |= {i: dict(zip(names, row, strict=True)) for i, row in zip(indices, rows, strict=True)}
    return scores
