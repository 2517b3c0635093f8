"""What a judge is given: every sample with its prompt and the baseline's response to it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from src.data.evaluation_prompts import next_turn, read_answers, read_prompts
from src.data.sources import open_source
from src.judges import Comparison
from src.planning.content import ContentPath, reading
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.stages import generate
from src.store.store import sample_key


def comparisons_of(
    inputs: EvaluateInputs, resources: Resources, samples: list[dict[str, Any]], upstream: dict[str, Path]
) -> list[Comparison]:
    """Pair each sample with the baseline's response to its prompt.

    That is a sample of the SFT model, the chosen response of the prompt's first held-out pair, or a row of a file; for
    a judge of a response by itself, nothing.
    """
    assert inputs.judge is not None
    baseline, prompts = inputs.judge.baseline, read_prompts(inputs.prompts, resources.expected_rows)
    baselines: dict[tuple[int, int, int], dict[str, Any]]
    if "baseline" in upstream:
        baselines = {sample_key(row): row for row in generate.read(upstream["baseline"])}
    elif isinstance(baseline, ContentPath):
        with reading(baseline):
            answers = read_answers(baseline.location, prompts, "judge.baseline")
        baselines = {sample_key(s): _of_turn(answers[s["index"]], s) for s in samples}
    elif baseline is None:
        baselines = {sample_key(s): {} for s in samples}
    else:
        chosen_responses: dict[tuple[str, ...], str] = {}
        for pair in open_source(inputs.prompts.data, resources.expected_rows).pairs("validation"):
            chosen_responses.setdefault(pair.prompt.key, pair.chosen)
        keys = {sample_key(s): prompts[s["index"]].prompt.key for s in samples}
        baselines = {place: {"response": chosen_responses[key]} for place, key in keys.items()}
    comparisons: list[Comparison] = []
    for sample in samples:
        prompt = prompts[sample["index"]].prompt
        if sample.get("turn", 1) > 1:
            prompt = next_turn(comparisons[-1].prompt, comparisons[-1].response["response"])
        comparisons.append(Comparison(prompt, sample, {"finished": True} | baselines[sample_key(sample)]))
    return comparisons


def _of_turn(answer: dict[str, Any], sample: dict[str, Any]) -> dict[str, Any]:
    return answer | {"response": answer["responses"][sample["turn"] - 1]} if "turn" in sample else answer
