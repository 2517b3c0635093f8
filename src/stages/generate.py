"""Samples of a checkpoint for the held-out prompts, with their log-probs under it and under what it started from."""

from __future__ import annotations

import json
import logging
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import Point
from src.data.questions import questions_of
from src.logprobs import score
from src.machine import release_accelerator
from src.models import compute_of, load_base, load_checkpoint, template_of
from src.pairs import Example
from src.sampling import sample
from src.serving import sample_through, served_folder, serving
from src.store import SAMPLES_FILE, Attempt, write_text

if TYPE_CHECKING:
    from collections.abc import Iterator

    from src.data.templates import Template

log = logging.getLogger(__name__)

RESPONSES_FILE = "responses.jsonl"  # beside the checkpoints: what is sampled so far


def read(folder: Path) -> list[dict[str, Any]]:
    """One row a prompt, in the source's order: index, prompt, response, finished, tokens, logp, reference_logp
    (both summed over the response, nats, untempered)."""
    return [json.loads(line) for line in (folder / SAMPLES_FILE).open()]


def run(point: Point, fields: dict[str, Any], upstream: dict[str, Path], attempt: Attempt) -> None:
    template = template_of(point)
    prompts = [question.prompt for question in questions_of(point)]
    numbered = [(i, template.prompt_ids(p)) for i, p in enumerate(prompts)]
    limit = point.dataset.max_prompt_tokens
    # Nothing can follow an empty prompt without a begin token.
    rows = [(i, ids[-limit:]) for i, ids in numbered if ids]
    if len(rows) < len(prompts):
        log.warning("%s: dropped %d of %d prompts: empty", attempt.label, len(prompts) - len(rows), len(prompts))
    if longer := sum(len(ids) > limit for _, ids in numbered):
        log.warning("%s: %d of %d prompts are cut to their last %d tokens", attempt.label, longer, len(prompts), limit)
    prompt_ids = [ids for _, ids in rows]
    # The baseline draws its own numbers, so that policy and baseline are independent samples; all policies of a
    # grid share theirs, so that points are compared on common random numbers.
    seed = f"{point.seed}/{point.evaluation.generation.seed}/{fields['role']}"

    count = len(rows)
    model = load_checkpoint(upstream["checkpoint"], point) if point.server.name == "none" else None
    responses = _sample(point, model or upstream["checkpoint"], template, prompt_ids, seed, attempt)
    model = model or load_checkpoint(upstream["checkpoint"], point)  # only when the server has left the accelerator
    examples = [Example(tuple(prompt_ids[i]), (tuple(responses[i][0]),)) for i in range(count)]
    logps = dict(_logps(point, model, examples))
    reference_logps = logps
    if fields["role"] == "policy":
        attempt.step(count + count // 2, 2 * count)
        start = load_checkpoint(upstream["reference"], point) if "reference" in upstream else load_base(point)
        reference_logps = dict(_logps(point, start, examples))
    attempt.step(2 * count, 2 * count)

    with (attempt.out / SAMPLES_FILE).open("w") as handle:
        for i, (number, _) in enumerate(rows):
            ids, finished = responses[i]
            row = {
                "index": number,
                "prompt": prompts[number].text,
                "response": template.text(ids),
                "finished": finished,
                "tokens": len(ids),
                "logp": logps[i],
                "reference_logp": reference_logps[i],
            }
            handle.write(json.dumps(row, ensure_ascii=False) + "\n")


def _sample(
    point: Point, model: Any, template: Template, prompt_ids: list[list[int]], seed: str, attempt: Attempt
) -> dict[int, tuple[list[int], bool]]:
    """Response and whether it finished, of every prompt. Each is written down as it comes: the next attempt goes on.
    model: the folder of the checkpoint where a server samples."""
    file = attempt.checkpoints / RESPONSES_FILE
    before = _written(file)
    if before:
        log.info("%s: %d of %d prompts were sampled before", attempt.label, len(before), len(prompt_ids))
        attempt.spent_before = max(row["seconds"] for row in before)
        attempt.tokens = sum(len(row["ids"]) for row in before)
    responses = {row["index"]: (row["ids"], row["finished"]) for row in before}
    begun, count = time.perf_counter(), 2 * len(prompt_ids)
    drawn = 0
    generation, compute = point.evaluation.generation, compute_of(point)
    with file.open("a") as handle:

        def keep(index: int, response: tuple[list[int], bool]) -> None:
            nonlocal drawn
            ids, finished = response
            drawn += len(ids)
            if index not in responses:  # or a batch of which a part was known
                row = {"index": index, "ids": ids, "finished": finished, "seconds": round(attempt.seconds, 3)}
                handle.write(json.dumps(row) + "\n")
                handle.flush()
                attempt.tokens += len(ids)
                responses[index] = response

        def beat() -> None:
            attempt.step(len(responses), count)

        if point.server.name == "none":
            for index, ids, finished in sample(model, template, prompt_ids, seed, generation, compute, set(responses)):
                keep(index, (ids, finished))
                beat()
        elif todo := {i: ids for i, ids in enumerate(prompt_ids) if i not in responses}:
            folder = served_folder(model, attempt.checkpoints, template, generation)
            release_accelerator()  # what training in this process has left; a server takes what it finds
            with serving(point.server, folder, point.engine.precision, attempt.checkpoints, beat) as url:
                sample_through(point.server, url, str(folder), template, todo, seed, generation, keep, beat)
    if drawn:
        log.info("%s: %.0f tokens/s", attempt.label, drawn / (time.perf_counter() - begun))
    return responses


def _written(file: Path) -> list[dict[str, Any]]:
    """The rows of an earlier attempt; not the one that it was writing when it died, which goes."""
    rows = []
    for line in file.read_text().splitlines() if file.exists() else []:
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError:
            break
    write_text(file, "".join(json.dumps(row) + "\n" for row in rows))
    return rows


def _logps(point: Point, model: Any, examples: list[Example]) -> Iterator[tuple[int, float]]:
    for indices, values, _ in score(model, examples, point.trainer.tokens_per_batch, compute_of(point)):
        yield from zip(indices, values.tolist(), strict=True)
