"""Candidates, graded by a judge -> preference pairs, which every method, beta and lr trains on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import combinations, count
from pathlib import Path
from typing import Any

from src.data.examples import Example
from src.data.rows import Prompt
from src.data.templates import Template
from src.data.tokenization import RowCounts, TokenizedDataset, load_examples
from src.data.training_prompts import training_prompts
from src.errors import StageError
from src.judges import Response, grading_function
from src.planning.content import digest
from src.planning.identity import AlignInputs, PairsInputs, ReferenceInputs
from src.planning.resources import Resources
from src.stages import candidates
from src.store.attempt import Attempt
from src.store.files import read_checksummed_json, read_json, status_of, write_json, write_jsonl
from src.store.store import DONE

TOKENS_FILE = "pairs.arrow"  # Examples, as training reads them
TEXTS_FILE = "pairs.jsonl"  # the same pairs as rows that dataset=jsonl reads, with their grades
COUNTS_FILE = "data.json"

log = logging.getLogger(__name__)


def training_examples(
    inputs: ReferenceInputs | AlignInputs,
    template: Template,
    resources: Resources,
    upstream: dict[str, Path],
    attempt: Attempt,
) -> TokenizedDataset:
    """Return the pairs that alignment trains on: those of this stage where it is upstream, else the dataset's."""
    if "pairs" in upstream:
        file = upstream["pairs"] / TOKENS_FILE
        return _read(file, status_of(file))
    return load_examples(inputs.data, inputs.model, "train", template, attempt, resources.expected_rows)


@lru_cache(maxsize=2)  # the points that a worker computes have the same pairs one after another
def _read(file: Path, status: tuple[int, ...]) -> TokenizedDataset:
    counts = read_json(file.with_name(COUNTS_FILE))
    return TokenizedDataset.read(file, RowCounts(dropped=counts["dropped"]))


def digest_of_pairs(upstream: dict[str, Path]) -> str | None:
    """Return a digest of the content of the pairs upstream; None where they are the dataset's."""
    if "pairs" not in upstream:
        return None
    return digest(read_checksummed_json(upstream["pairs"] / DONE)["files"][TOKENS_FILE])


def run(inputs: PairsInputs, resources: Resources, upstream: dict[str, Path], attempt: Attempt) -> None:
    prompts = training_prompts(inputs.prompts, resources.expected_rows, attempt.track)
    folder = upstream["candidates"]
    responses = [
        Response(prompts[row["index"]], response["text"], response["finished"])
        for row in candidates.read(folder)
        for response in row["responses"]
    ]
    grades = grading_function(inputs.judge.name)(inputs.judge, resources, responses, attempt)
    if not attempt.is_main_process:
        return
    dropped: Counter[str] = Counter()
    texts: list[dict[str, Any]] = []
    remaining, num_prompts = iter(grades), count()

    def examples() -> Iterator[Example]:
        for row in candidates.read(folder):
            next(num_prompts)
            answers = row["responses"]
            of_prompt = [next(remaining) for _ in answers]
            selected = select_pairs(of_prompt, inputs.selection, inputs.margin)
            if not selected:
                dropped[why_no_pair(of_prompt)] += 1
            for best, worst in selected:
                texts.append(
                    _text(prompts[row["index"]], answers[best], answers[worst], of_prompt[best], of_prompt[worst])
                )
                yield _example(inputs, row["prompt"], answers[best]["ids"], answers[worst]["ids"])

    counts = RowCounts()
    dataset = TokenizedDataset.collect(examples(), counts)
    total, num_pairs = next(num_prompts), len(dataset.examples)
    counts.dropped |= dropped
    for reason, number in dropped.items():
        log.warning("%s: no pair of %d of %d prompts: %s", attempt.label, number, total, reason)
    if not num_pairs:
        reasons = ", ".join(f"{number}: {reason}" for reason, number in counts.dropped.items())
        raise StageError(
            f"pairs=onpolicy: no pair of {total} prompts ({reasons}); raise pairs.generation."
            "samples_per_prompt or pairs.generation.temperature, or lower pairs.margin"
        )
    dataset.write(attempt.out / TOKENS_FILE)
    write_jsonl(attempt.out / TEXTS_FILE, texts)
    write_json(attempt.out / COUNTS_FILE, {"prompts": total, "pairs": num_pairs, "dropped": counts.dropped})
    log.info("%s: %d pairs of %d prompts", attempt.label, num_pairs, total)


def select_pairs(grades: list[float], selection: str, margin: float) -> list[tuple[int, int]]:
    """Return (chosen, rejected), the indices of responses to one prompt whose grades differ by more than `margin`.

    `best_worst`: the first of the highest and the first of the lowest grades; `all`: every pair.
    """
    numbers = range(len(grades))
    if selection == "best_worst":
        candidate_pairs = [(max(numbers, key=grades.__getitem__), min(numbers, key=grades.__getitem__))]
    else:
        candidate_pairs = [(a, b) if grades[a] > grades[b] else (b, a) for a, b in combinations(numbers, 2)]
    return [(a, b) for a, b in candidate_pairs if grades[a] - grades[b] > margin]


def why_no_pair(grades: list[float]) -> str:
    """Return why a prompt has no pair, for counts of what was dropped."""
    return "all grades equal" if max(grades) == min(grades) else "no difference of grades above pairs.margin"


def _example(inputs: PairsInputs, prompt: list[int], chosen: list[int], rejected: list[int]) -> Example:
    """Return the sampled tokens as they are, cut where those of a dataset are."""
    limit = inputs.prompts.data.max_tokens - len(prompt)
    return Example(tuple(prompt), (tuple(chosen[:limit]), tuple(rejected[:limit])))


def _text(
    prompt: Prompt, chosen: dict[str, Any], rejected: dict[str, Any], chosen_grade: float, rejected_grade: float
) -> dict[str, Any]:
    texts = {"prompt": list(prompt.messages), "chosen": chosen["text"], "rejected": rejected["text"]}
    return {**texts, "chosen_grade": chosen_grade, "rejected_grade": rejected_grade}
