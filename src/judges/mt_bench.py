"""MT-Bench, single-answer grading: a language model rates both answers of a conversation from 1 to 10.

Which prompt a turn has, how a rating is read and what is averaged is as in FastChat's llm_judge. So are the prompts,
when judge.prompt_file names its judge_prompts.jsonl, and the references, when judge.references names GPT-4's answers.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

from src.judges import Comparison, Judged, Verdict
from src.judges.judge_client import JudgeClient, usage_of
from src.judges.mt_bench_turns import load_prompts, standard_error, turns_of
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources
from src.store.attempt import Attempt

HIGHEST = 10
_PATTERNS = (
    re.compile(r"\[\[(\d+\.?\d*)\]\]"),
    re.compile(r"\[(\d+\.?\d*)\]"),
)  # the second where the first is missing


def mt_bench(
    inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison], attempt: Attempt
) -> Judged:
    """Rate every response; a verdict is a tenth of the rating, .5 without one."""
    assert inputs.judge is not None
    prompts = load_prompts(inputs)
    turns = list(turns_of(inputs, resources, comparisons))
    chats = [turn.chat(prompts, "single", answer=turn.responses) for turn in turns]
    answers = JudgeClient(inputs.judge, resources.judge, attempt.output_dir).complete(chats, attempt)
    ratings = [parse_rating(answer["text"]) for answer in answers]
    verdicts = [
        Verdict(0.5 if rating is None else rating / HIGHEST, answer["text"].strip() or "(nothing)")
        for rating, answer in zip(ratings, answers, strict=True)
    ]
    rated = [
        (comparison.response["index"], turn.number, rating)
        for comparison, turn, rating in zip(comparisons, turns, ratings, strict=True)
        if rating is not None
    ]
    return Judged(verdicts, usage_of(resources.judge, answers, attempt, ratings.count(None)), scores_of(rated))


def parse_rating(text: str) -> float | None:
    """Return the first rating of an answer; None without one from 0 to 10."""
    match = next((found for pattern in _PATTERNS if (found := pattern.search(text))), None)
    rating = None if match is None else float(match[1])
    return rating if rating is not None and rating <= HIGHEST else None


def scores_of(ratings: Sequence[tuple[int, int, float]]) -> dict[str, dict[str, float]]:
    """Return the mean rating of all turns, and of each. ratings: (question, turn, rating)."""
    scores = {}
    for name, wanted in (("mt_bench_rating", (1, 2)), ("first_turn_rating", (1,)), ("second_turn_rating", (2,))):
        of_question: dict[int, list[float]] = {}
        for question, turn, rating in ratings:
            if turn in wanted:
                of_question.setdefault(question, []).append(rating)
        values = [rating for several in of_question.values() for rating in several]
        if (error := standard_error(of_question)) is not None:
            scores[name] = {"value": sum(values) / len(values), "se": error}
    return scores
