"""Candidates, graded by a judge -> preference pairs, which every method, beta and lr trains on."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterator
from functools import lru_cache
from itertools import chain, combinations, islice
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
from src.store.store import COUNTS_FILE, DONE

TOKENS_FILE = "pairs.arrow"  # Examples, as training reads them
TEXTS_FILE = "pairs.jsonl"  # the same pairs as rows that dataset=jsonl reads, with their grades

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
    responses = [
        [Response(prompts[row["index"]], response["text"], response["finished"]) for response in row["responses"]]
        for row in candidates.read(upstream["candidates"])
    ]
    judge = grading_function(inputs.judge.name)
    grades = judge(inputs.judge, resources, list(chain.from_iterable(responses)), attempt)
    if not attempt.is_main_process:
        return
    remaining = iter(grades)
    by_prompt = [list(islice(remaining, len(of_prompt))) for of_prompt in responses]
    selected = [select_pairs(of_prompt, inputs.selection, inputs.margin) for of_prompt in by_prompt]

    def made() -> Iterator[tuple[dict[str, Any], list[float], int, int]]:
        # Read a second time rather than kept: the tokens of all candidates take gigabytes.
        rows = zip(candidates.read(upstream["candidates"]), by_prompt, selected, strict=True)
        return ((row, of_prompt, *pair) for row, of_prompt, pairs in rows for pair in pairs)

    counts = RowCounts()
    examples = (_example(inputs, row, chosen, rejected) for row, _, chosen, rejected in made())
    dataset = TokenizedDataset.collect(examples, counts)
    counts.dropped |= Counter(why_no_pair(g) for g, pairs in zip(by_prompt, selected, strict=True) if not pairs)
    for reason, number in counts.dropped.items():
        log.warning("%s: dropped %d of %d prompts: %s", attempt.label, number, len(by_prompt), reason)
    if not dataset.examples:
        reasons = ", ".join(f"{number}: {reason}" for reason, number in counts.dropped.items())
        raise StageError(
            f"pairs=onpolicy: no pair of {len(by_prompt)} prompts ({reasons}); raise pairs.generation."
            "samples_per_prompt or pairs.generation.temperature, or lower pairs.margin"
        )
    dataset.write(attempt.out / TOKENS_FILE)
    write_jsonl(attempt.out / TEXTS_FILE, (_texts(prompts[pair[0]["index"]], *pair) for pair in made()))
    content = {"prompts": len(by_prompt), "pairs": len(dataset.examples), "dropped": counts.dropped}
    write_json(attempt.out / COUNTS_FILE, content)
    log.info("%s: %d pairs of %d prompts", attempt.label, len(dataset.examples), len(by_prompt))


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


def _example(inputs: PairsInputs, row: dict[str, Any], chosen: int, rejected: int) -> Example:
    """Return the sampled tokens as they are, cut where those of a dataset are."""
    limit = inputs.prompts.data.max_tokens - len(row["prompt"])
    ids = (tuple(row["responses"][number]["ids"][:limit]) for number in (chosen, rejected))
    return Example(tuple(row["prompt"]), tuple(ids))


def _texts(prompt: Prompt, row: dict[str, Any], grades: list[float], chosen: int, rejected: int) -> dict[str, Any]:
    texts = {"chosen": row["responses"][chosen]["text"], "rejected": row["responses"][rejected]["text"]}
    graded = {"chosen_grade": grades[chosen], "rejected_grade": grades[rejected]}
    return {"prompt": list(prompt.messages), **texts, **graded}
