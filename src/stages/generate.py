"""Samples of a checkpoint for the held-out prompts, with their log-probs under it and under what it started from."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import TYPE_CHECKING, Any

from src.config import Point
from src.data import source_of
from src.logprobs import score
from src.models import compute_of, load_base, load_checkpoint, template_of
from src.pairs import Example
from src.sampling import sample
from src.store import Attempt

if TYPE_CHECKING:
    from collections.abc import Iterator

log = logging.getLogger(__name__)

SAMPLES_FILE = "samples.jsonl"


def read(folder: Path) -> list[dict[str, Any]]:
    """One row a prompt, in the source's order: index, prompt, response, finished, tokens, logp, reference_logp
    (both summed over the response, nats, untempered)."""
    return [json.loads(line) for line in (folder / SAMPLES_FILE).open()]


def run(point: Point, fields: dict[str, Any], upstream: dict[str, Path], attempt: Attempt) -> None:
    template = template_of(point)
    prompts = source_of(point).prompts(point.evaluation.prompts)
    numbered = ((i, template.prompt_ids(p)[-point.dataset.max_prompt_tokens :]) for i, p in enumerate(prompts))
    rows = [(i, ids) for i, ids in numbered if ids]  # nothing can follow an empty prompt without a begin token
    if len(rows) < len(prompts):
        log.warning("%s: dropped %d of %d prompts: empty", point.dataset.name, len(prompts) - len(rows), len(prompts))
    prompt_ids = [ids for _, ids in rows]
    model = load_checkpoint(upstream["checkpoint"], point)
    # The baseline draws its own numbers, so that policy and baseline are independent samples; all policies of a
    # grid share theirs, so that points are compared on common random numbers.
    seed = f"{point.seed}/{point.evaluation.generation.seed}/{fields['role']}"

    count = len(rows)
    responses: dict[int, tuple[list[int], bool]] = {}
    for index, ids, finished in sample(
        model, template, prompt_ids, seed, point.evaluation.generation, compute_of(point)
    ):
        responses[index] = (ids, finished)
        attempt.tokens += len(ids)
        attempt.step(len(responses), 2 * count)

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


def _logps(point: Point, model: Any, examples: list[Example]) -> Iterator[tuple[int, float]]:
    for indices, values, _ in score(model, examples, point.trainer.tokens_per_batch, compute_of(point)):
        yield from zip(indices, values.tolist(), strict=True)
