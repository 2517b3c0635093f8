"""What judges need of the prompts of a file: answers, categories, references. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from src.config.schema import Point
from src.data.evaluation_prompts import BASELINE_MODELS, EvaluationPrompt, read_references
from src.errors import ConfigError


def check_prompts(point: Point, prompts: Sequence[EvaluationPrompt]) -> None:
    """Raise ConfigError when a prompt lacks what the judge needs."""
    judge, key = point.judge, f"evaluation.prompts_file={point.evaluation.prompts_file}"
    for entry in prompts:
        facts = entry.prompt.facts
        if judge.name == "math" and "answer" not in facts:
            raise ConfigError(
                f"{key}: judge=math needs the answer to every problem (`answer`, or a \\boxed in `solution`); there is "
                f"none to {entry.key[:60]!r}"
            )
        if judge.name == "arena_hard_v2" and facts.get("category") not in BASELINE_MODELS:
            raise ConfigError(
                f"{key}: judge=arena_hard_v2 needs questions of the category {' or '.join(BASELINE_MODELS)}, that of "
                f"{entry.key[:60]!r} is {facts.get('category')}; give the questions of v2"
            )
    if judge.references is not None:
        read_references(judge.references, prompts)
