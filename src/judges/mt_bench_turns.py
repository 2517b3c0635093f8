"""Turns of MT-Bench's conversations as its judges read them: questions, answers, and references where there are any."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from src.data.evaluation_prompts import NEED_REFERENCES, read_prompts, read_references
from src.data.rows import Prompt
from src.judges import Comparison
from src.judges.judge_client import Messages
from src.judges.prompt_file import LOADERS, mt_bench_fields, mt_bench_prompt
from src.planning.content import reading
from src.planning.identity import EvaluateInputs
from src.planning.resources import Resources

PROMPT_FILE = str(Path(__file__).with_name("mt_bench.json"))  # without judge.prompt_file

Prompts = Mapping[str, tuple[str, str]]  # name -> system prompt and template


class Turn(NamedTuple):
    """A turn of a conversation with all before it; responses and baselines: to each of its questions."""

    number: int  # from 1
    questions: list[str]
    responses: list[str]
    baselines: list[str]  # empty texts without a baseline
    references: list[str]  # as many as questions, or none

    def chat(self, prompts: Prompts, kind: str, **answers: Sequence[str]) -> Messages:
        """Return the judge's question. answers: `answer`, or `answer_a` and `answer_b`, to each question."""
        columns = {"question": self.questions, "ref_answer": self.references, **answers}
        texts = {f"{name}_{n}": text for name, column in columns.items() for n, text in enumerate(column, 1)}
        texts |= {name: column[0] for name, column in columns.items() if column}
        has_reference = bool(self.references)
        system, template = prompts[mt_bench_prompt(kind, self.number, has_reference)]
        fields = mt_bench_fields(kind, self.number, has_reference)
        content = template.format(**{name: texts[name] for name in fields})
        return [{"role": "system", "content": system}, {"role": "user", "content": content}]


def load_prompts(inputs: EvaluateInputs) -> Prompts:
    """Return the prompts of the judge: those of judge.prompt_file, or of this project."""
    judge = inputs.judge
    assert judge is not None
    with reading(judge.prompt_file):
        return LOADERS[judge.name](judge.prompt_file.location if judge.prompt_file else PROMPT_FILE)


def turns_of(inputs: EvaluateInputs, resources: Resources, comparisons: Sequence[Comparison]) -> Iterator[Turn]:
    """Yield the turn of every comparison. Those of a conversation follow each other."""
    judge, entries = inputs.judge, read_prompts(inputs.prompts, resources.expected_rows)
    assert judge is not None
    given = {}
    with reading(judge.references):
        if judge.references is not None:
            given = read_references(judge.references.location, entries)
    conversation: list[Comparison] = []
    for comparison in comparisons:
        number = comparison.response.get("turn", 1)
        conversation = [*conversation[: number - 1], comparison]
        key = entries[comparison.response["index"]].key
        yield Turn(
            number,
            [turn.prompt.messages[-1]["content"] for turn in conversation],
            [turn.response["response"] for turn in conversation],
            [turn.baseline.get("response", "") for turn in conversation],
            _references(comparison.prompt, given.get(key), number),
        )


def _references(prompt: Prompt, given: Sequence[str] | None, turn: int) -> list[str]:
    """Return the references for all turns so far; none where one is missing, or the category is judged without."""
    if prompt.facts.get("category") not in NEED_REFERENCES:
        return []
    own = [prompt.facts.get(f"reference_{n}", "") for n in range(1, turn + 1)]
    references = own if given is None else list(given[:turn])
    return references if len(references) == turn and all(references) else []


def standard_error(values: Mapping[Any, list[float]]) -> float | None:
    """Return the standard error of the mean over conversations, whose turns are one observation; None for one alone."""
    means = [sum(turns) / len(turns) for turns in values.values()]
    if len(means) < 2:
        return None
    mean = sum(means) / len(means)
    return (sum((value - mean) ** 2 for value in means) / (len(means) - 1) / len(means)) ** 0.5
