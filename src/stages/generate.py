"""Samples of a checkpoint for the held-out prompts, with their log-probs under it and under what it started from."""

from __future__ import annotations

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

from src.data.evaluation_prompts import read_prompts
from src.data.examples import Example
from src.data.rows import Prompt
from src.data.templates import Template
from src.distributed import get_distributed
from src.hardware import release_accelerator
from src.model.adapters import is_adapter
from src.model.loading import load_for_inference, load_template, load_weights, numerics_of, save_checkpoint
from src.model.logprobs import iter_kl
from src.model.sampling import sample
from src.planning.content import digest
from src.planning.identity import CandidatesInputs, CapabilityInputs, GenerateInputs, GenerationInputs
from src.planning.resources import Resources
from src.serving.model_server import sample_through, served_folder, serving
from src.stages.shared_rows import Row, SharedRows
from src.stages.turns import Question, next_question
from src.store.attempt import Attempt
from src.store.files import read_jsonl, remove, write_jsonl
from src.store.store import SAMPLES_FILE

log = logging.getLogger(__name__)

MERGED = "merged"  # folder, among the checkpoints, of a model that a server samples from
RESPONSES = "responses"  # name of the files, among the checkpoints, of what is sampled so far
LATER_RESPONSES = "later"  # the same of the turns after the first; RESPONSES-NUMBER would be a rank's file of RESPONSES
SCORES = ("logp", "reference_logp", "kl")


def read(folder: Path) -> list[dict[str, Any]]:
    """Return a row per sample: index (of its prompt), prompt, response, finished, tokens, logp, reference_logp, kl.

    The samples of a prompt are next to each other; where it has several, `sample` counts them from 0. The last three
    are those of `src.model.logprobs.sequence_kl`: summed over the response, in nats, at temperature 1.
    Of prompts of a mixture, or of a benchmark that tells, also source: the table or part they are of. Of conversations
    also turn, from 1; its prompt has the turns before it.
    """
    return list(read_jsonl(folder / SAMPLES_FILE))


def run(inputs: GenerateInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    prompts = [entry.prompt for entry in read_prompts(inputs.prompts, resources.expected_rows)]
    several = inputs.generation.samples_per_prompt
    rows = prompts_to_answer(inputs, template, prompts, attempt)
    questions = [Question(number, i % several, 1, prompts[number], ids) for i, (number, ids) in enumerate(rows)]
    asked, responses, model = _sample_turns(inputs, resources, upstream, template, questions, attempt)
    with attempt.loading():
        # After the server has released the accelerator. A baseline is its own reference.
        model = model or _load(inputs, resources, upstream, "checkpoint")
        initial = _load(inputs, resources, upstream, "reference") if inputs.role == "policy" else model
    examples = [Example(tuple(q.ids), (tuple(row["ids"]),)) for q, row in zip(asked, responses, strict=True)]
    scores = _scores(inputs, resources, model, initial, examples, attempt)
    if not attempt.is_main_process:
        return
    in_order = sorted(enumerate(asked), key=lambda item: item[1][:3])
    samples = (
        {
            "index": question.number,
            **({"sample": question.sample} if several > 1 else {}),
            **({"turn": question.turn} if prompts[question.number].follow_ups else {}),
            "prompt": question.prompt.text,
            "response": template.text(responses[i]["ids"]),
            "finished": responses[i]["finished"],
            "tokens": len(responses[i]["ids"]),
            **{name: scores[i][name] for name in SCORES},
            **({"source": question.prompt.source} if question.prompt.source else {}),
        }
        for i, question in in_order
    )
    write_jsonl(attempt.out / SAMPLES_FILE, samples)


def _sample_turns(
    inputs: GenerateInputs,
    resources: Resources,
    upstream: dict[str, Path],
    template: Template,
    questions: list[Question],
    attempt: Attempt,
) -> tuple[list[Question], list[Row], Any]:
    """Return all turns of the questions, given the first ones, their responses, and the model, if it was loaded."""
    # Policy and baseline have different seeds, so that their samples are independent; all policies of a grid have the
    # same, so that points are compared on common random numbers.
    seed = f"{inputs.seed}/{inputs.generation.seed}/{inputs.role}"
    total = 2 * sum(1 + len(question.prompt.follow_ups) for question in questions)
    asked: list[Question] = []
    responses: list[Row] = []
    model: Any = None
    while questions:
        ids, temperatures = [q.ids for q in questions], [q.temperature(inputs) for q in questions]
        seed_of_turn = f"{seed}/turn {questions[0].turn}" if asked else seed
        progress = Progress(len(asked), total)
        sampled, model = sample_responses(
            inputs, resources, upstream, template, ids, seed_of_turn, progress, attempt, temperatures, model
        )
        asked += questions
        rows = [sampled[i] for i in range(len(questions))]
        responses += rows
        answered = zip(questions, rows, strict=True)
        questions = [
            next_question(inputs, template, q, row["ids"], attempt) for q, row in answered if q.prompt.follow_ups
        ]
    return asked, responses, model


class Progress(NamedTuple):
    """The responses that were sampled before, and the steps of the stage, of which each response is one."""

    done: int
    total: int


def sample_responses(
    inputs: GenerateInputs | CandidatesInputs,
    resources: Resources,
    upstream: dict[str, Path],
    template: Template,
    prompt_ids: list[list[int]],
    seed: str,
    progress: Progress,
    attempt: Attempt,
    temperatures: Sequence[float] | None = None,
    model: Any = None,
) -> tuple[dict[int, Row], Any]:
    """Return a row for each of `prompt_ids`, the `ids` of its response and whether it `finished`.

    And the model, if it was loaded. temperatures: of each prompt, None for the one of all. model: loaded before.
    """
    release_accelerator()  # of what earlier stages of this process held: the cache of keys and values needs it
    if model is None and inputs.generation.server is None:
        model = _load(inputs, resources, upstream, "checkpoint")
    sampled = model or whole_model(inputs, resources, upstream, template, attempt)
    temperatures = temperatures or [inputs.generation.temperature] * len(prompt_ids)
    responses = _sample(inputs, resources, sampled, template, prompt_ids, temperatures, seed, progress, attempt)
    if attempt.is_main_process:
        remove(attempt.checkpoints / MERGED)  # a whole model that no process needs any more
    release_accelerator()  # of that cache: scoring needs the memory for a second model
    return responses, model


def _load(
    inputs: GenerateInputs | CandidatesInputs, resources: Resources, upstream: dict[str, Path], checkpoint: str
) -> Any:
    return load_for_inference(inputs.model, resources, upstream.get(checkpoint), upstream.get("reference"))


def prompts_to_answer(
    inputs: GenerateInputs | CandidatesInputs, template: Template, prompts: list[Prompt], attempt: Attempt
) -> list[tuple[int, list[int]]]:
    """Return (number of the prompt, its ids) of every prompt that can be answered; warn of those that are changed.

    Each stands there samples_per_prompt times in succession.
    """
    numbered = [(i, template.prompt_ids(p)) for i, p in enumerate(prompts)]
    limit = inputs.prompts.data.max_prompt_tokens
    # Without any token, not even a begin token, there is no position that predicts the first response token.
    rows = [(i, ids[-limit:]) for i, ids in numbered if ids]
    if attempt.is_main_process and len(rows) < len(prompts):
        log.warning("%s: dropped %d of %d prompts: empty", attempt.label, len(prompts) - len(rows), len(prompts))
    longer = sum(len(ids) > limit for _, ids in numbered)
    if attempt.is_main_process and longer:
        log.warning("%s: %d of %d prompts are cut to their last %d tokens", attempt.label, longer, len(prompts), limit)
    return [row for row in rows for _ in range(inputs.generation.samples_per_prompt)]


def whole_model(
    inputs: GenerateInputs | CandidatesInputs | CapabilityInputs,
    resources: Resources,
    upstream: dict[str, Path],
    template: Template,
    attempt: Attempt,
) -> Path:
    """Return the folder of the checkpoint for a server: that of adapters as a model they are merged into.

    Servers differ in how they compute with adapters, if they can; merged ones are what is scored.
    """
    checkpoint, folder = upstream["checkpoint"], attempt.checkpoints / MERGED
    if not is_adapter(checkpoint):
        return checkpoint
    if attempt.is_main_process:
        remove(folder)  # of an earlier attempt
        merged = load_weights(inputs.model, resources, checkpoint, upstream.get("reference"))
        save_checkpoint(merged, template, folder)
    get_distributed().barrier()
    return folder


def _sample(
    inputs: GenerateInputs | CandidatesInputs,
    resources: Resources,
    model: Any,
    template: Template,
    prompt_ids: list[list[int]],
    temperatures: Sequence[float],
    seed: str,
    progress: Progress,
    attempt: Attempt,
) -> dict[int, Row]:
    """Return the responses as `sample_responses` does. model: a checkpoint's folder with a server."""
    started, count = time.perf_counter(), len(prompt_ids)
    # A response that is damaged on disk may be another one in the next attempt, and so are the turns after it.
    name = f"{LATER_RESPONSES}-{digest(prompt_ids)}" if progress.done else RESPONSES
    rows = SharedRows(attempt, name, lambda done: attempt.step(progress.done + done, progress.total))
    if rows.known and attempt.is_main_process:
        log.info("%s: %d of %d responses were sampled before", attempt.label, len(rows.known), count)
    numerics, batch_size = numerics_of(inputs.model, resources), resources.sampling_batch_size
    by_temperature = [
        (replace(inputs.generation, temperature=value), [i for i in range(count) if temperatures[i] == value])
        for value in dict.fromkeys(temperatures)
    ]
    if inputs.generation.server is not None:
        mine = {i for (i,) in rows.share.of([i] for i in range(count))}
        todo = [(g, {i: prompt_ids[i] for i in indices if i in mine}) for g, indices in by_temperature]
        _sample_by_server(inputs, resources, model, template, todo, seed, attempt, rows)
    else:
        for generation, indices in by_temperature:
            for index, ids, finished in sample(
                *(model, template, prompt_ids, seed, generation, numerics),
                batch_size=batch_size, share=rows.share, only=indices,
            ):  # fmt: skip
                rows.save({index: {"ids": ids, "finished": finished}})
    responses = rows.gather()
    num_tokens = sum(len(row["ids"]) for row in responses.values())
    attempt.tokens += num_tokens
    if (new := num_tokens - sum(len(row["ids"]) for row in rows.known.values())) and attempt.is_main_process:
        log.info("%s: %.0f tokens/s", attempt.label, new / (time.perf_counter() - started))
    return responses


def _sample_by_server(
    inputs: GenerateInputs | CandidatesInputs,
    resources: Resources,
    checkpoint: Path,
    template: Template,
    prompts: list[tuple[GenerationInputs, dict[int, list[int]]]],
    seed: str,
    attempt: Attempt,
    rows: SharedRows,
) -> None:
    """Sample the prompts of this rank by a server of its own, on its accelerator."""
    if not any(ids for _, ids in prompts):
        return
    own_folder = attempt.checkpoints / f"server-{get_distributed().rank}"
    own_folder.mkdir(exist_ok=True)
    folder = served_folder(checkpoint, own_folder, template, inputs.generation)
    release_accelerator()  # a server allocates the memory that is free when it starts
    assert inputs.generation.server is not None
    _, command = inputs.generation.server
    timeout, precision, concurrency = resources.server_timeout, inputs.model.precision, resources.server_concurrency

    def save(index: int, response: tuple[list[int], bool]) -> None:
        ids, finished = response
        rows.save({index: {"ids": ids, "finished": finished}})

    with contextlib.ExitStack() as cleanup:
        with attempt.loading():
            server = serving(command, timeout, folder, precision, own_folder, rows.report)
            url = cleanup.enter_context(server)
        for generation, ids in prompts:
            sample_through(url, concurrency, str(folder), template, ids, seed, generation, save, rows.report)


def _scores(
    inputs: GenerateInputs,
    resources: Resources,
    model: Any,
    initial: Any,
    examples: list[Example],
    attempt: Attempt,
) -> dict[int, Row]:
    """Return the SCORES of every response."""
    numerics, budget, count = numerics_of(inputs.model, resources), resources.max_tokens_per_micro_batch, len(examples)
    # A response that is damaged on disk may be another one in the next attempt, whose scores are others.
    scored = digest([example.responses for example in examples])
    rows = SharedRows(attempt, f"scores-{scored}", lambda done: attempt.step(count + done, 2 * count))
    for indices, *columns in iter_kl(model, initial, examples, budget, numerics, rows.share):
        values = zip(*(column.tolist() for column in columns), strict=True)
        rows.save({i: dict(zip(SCORES, row, strict=True)) for i, row in zip(indices, values, strict=True)})
    return rows.gather()
