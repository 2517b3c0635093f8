"""Responses of the SFT model to the prompts of training pairs, several for each: on-policy pairs are made of them."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from src.data.training_prompts import training_prompts
from src.model.loading import load_template
from src.planning.identity import CandidatesInputs
from src.planning.resources import Resources
from src.stages import generate
from src.store.attempt import Attempt
from src.store.files import read_jsonl, write_jsonl

FILE = "candidates.jsonl"


def read(folder: Path) -> Iterator[dict[str, Any]]:
    """Yield one row per prompt: index, prompt (its ids), responses (ids, text and finished of each)."""
    return read_jsonl(folder / FILE)


def run(inputs: CandidatesInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    template = load_template(inputs.model)
    prompts = training_prompts(inputs.prompts, resources.expected_rows, attempt.track)
    rows = generate.prompts_to_answer(inputs, template, prompts, attempt)
    prompt_ids, several = [ids for _, ids in rows], inputs.generation.samples_per_prompt
    seed = f"{inputs.seed}/{inputs.generation.seed}/{inputs.kind}"
    progress = generate.Progress(0, len(prompt_ids))
    responses, _ = generate.sample_responses(inputs, resources, upstream, template, prompt_ids, seed, progress, attempt)
    if not attempt.is_main_process:
        return

    def response(number: int) -> dict[str, Any]:
        ids, finished = responses[number]["ids"], responses[number]["finished"]
        return {"ids": ids, "text": template.text(ids), "finished": finished}

    starts = range(0, len(rows), several)
    lines = ((*rows[start], [response(start + k) for k in range(several)]) for start in starts)
    write_jsonl(attempt.out / FILE, ({"index": i, "prompt": ids, "responses": answers} for i, ids, answers in lines))
