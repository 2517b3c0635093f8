"""The prompts that responses are sampled for, and a baseline's answers to them from a file.

Prompts are held-out ones of the dataset, or a benchmark's: the files of AlpacaEval, Arena-Hard (both versions, in both
layouts), MT-Bench, GSM8K, MATH and AIME are read unchanged.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import replace
from functools import reduce
from operator import getitem
from typing import Any, NamedTuple

from src.data.boxes import last_box
from src.data.rows import NO_EXPECTATION, ExpectedRows, Prompt, list_columns, read_rows, text_prompt
from src.data.sources import open_source
from src.errors import ConfigError
from src.planning.content import reading
from src.planning.identity import PromptInputs

# The text of a prompt: AlpacaEval has instruction, GSM8K question, MATH problem, AIME Problem.
_TEXT_FIELDS = ("instruction", "prompt", "question", "problem", "Problem")
_KEY_FIELDS = ("question_id", "uid", *_TEXT_FIELDS)  # what an answer is matched with its prompt by
# The part of a benchmark that a prompt is of: AlpacaEval has dataset, MATH500 subject.
_SOURCE_FIELDS = ("source", "dataset", "subject")
_RESPONSE_FIELDS = ("output", "response", "completion", "answer")
# Where Arena-Hard has an answer within a column: in files of 2024 (and MT-Bench has its turns), and since then.
_NESTED_ANSWERS: dict[str, tuple[Any, ...]] = {
    "choices": (0, "turns"),
    "messages": (-1, "content", "answer"),
}
_GENERATOR_FIELDS = ("generator", "model_id", "model")
# Whose answer is the baseline's, by category of the question, where a file has those of several models (Arena-Hard v2).
BASELINE_MODELS = {"hard_prompt": "o3-mini-2025-01-31", "creative_writing": "gemini-2.0-flash-001"}


NEED_REFERENCES = ("math", "reasoning", "coding")  # categories of MT-Bench that are judged with reference answers


class EvaluationPrompt(NamedTuple):
    key: str  # by which an answer in a file is matched with its prompt
    prompt: Prompt


def read_prompts(inputs: PromptInputs, expected_rows: ExpectedRows = NO_EXPECTATION) -> list[EvaluationPrompt]:
    """Return the first num_prompts prompts, always in the same order.

    Raises ConfigError when the file has fewer, has one twice, or one with more turns than are wanted.
    """
    if inputs.file is None:
        held_out = open_source(inputs.data, expected_rows).prompts(inputs.num_prompts)
        return [EvaluationPrompt(prompt.text, prompt) for prompt in held_out]
    file = inputs.file.location
    with reading(inputs.file):
        prompts = [_prompt(row, where, inputs.num_turns) for where, row in read_rows(file, "evaluation.prompts_file")]
    if len(prompts) < inputs.num_prompts:
        raise ConfigError(
            f"evaluation.prompts_file={file}: {len(prompts)} prompts and evaluation.num_prompts={inputs.num_prompts}; "
            f"give at most evaluation.num_prompts={len(prompts)}"
        )
    counts = Counter(entry.key for entry in prompts)
    if repeated := [key for key, count in counts.items() if count > 1]:
        raise ConfigError(f"evaluation.prompts_file={file}: a prompt occurs twice: {repeated[0][:60]!r}")
    if len({entry.prompt.facts.get("category") for entry in prompts}) > 1:  # else it is no part of the benchmark
        prompts = [entry._replace(prompt=_of_category(entry.prompt)) for entry in prompts]
    return prompts[: inputs.num_prompts]


def _of_category(prompt: Prompt) -> Prompt:
    return replace(prompt, source=prompt.source or prompt.facts.get("category", ""))


def next_turn(prompt: Prompt, response: str) -> Prompt:
    """Return the prompt of the next turn: this one, the response to it, and the first of its follow-ups."""
    follow_up, *later = prompt.follow_ups
    messages = {"role": "assistant", "content": response}, {"role": "user", "content": follow_up}
    return replace(prompt, messages=(*prompt.messages, *messages), follow_ups=tuple(later))


def read_answers(file: str, prompts: Sequence[EvaluationPrompt], key: str) -> list[dict[str, Any]]:
    """Return response and generator for each prompt, in their order; of a conversation also all its `responses`.

    key: the config key that names the file. Raises ConfigError naming file and line, or the prompt that has no answer.
    """
    answers: dict[str, dict[str, dict[str, Any]]] = {}  # prompt -> generator -> answer
    for where, row in read_rows(file, key):
        generator = str(next((row[name] for name in _GENERATOR_FIELDS if row.get(name)), "baseline"))
        responses = _answers(row, where)
        answer: dict[str, Any] = {"response": responses[0], "generator": generator}
        answer |= {"responses": responses} if len(responses) > 1 else {}
        if answers.setdefault(_key(row, where), {}).setdefault(generator, answer) != answer:
            raise ConfigError(f"{where}: a second, other answer to {_key(row, where)[:60]!r}; give one for each prompt")
    return [_baseline_answer(prompt, answers.get(prompt.key, {}), f"{key}={file}") for prompt in prompts]


def read_references(file: str, entries: Sequence[EvaluationPrompt]) -> dict[str, list[str]]:
    """Return the references of the questions that need them, by key. Raises ConfigError for one that has none."""
    needing = [entry for entry in entries if entry.prompt.facts.get("category") in NEED_REFERENCES]
    answers = read_answers(file, needing, "judge.references")
    return {
        entry.key: answer.get("responses", [answer["response"]]) for entry, answer in zip(needing, answers, strict=True)
    }


def _baseline_answer(prompt: EvaluationPrompt, answers: dict[str, dict[str, Any]], where: str) -> dict[str, Any]:
    """Return the only answer, or that of the baseline of the prompt's category. answers: by generator."""
    if not answers:
        raise ConfigError(f"{where}: no answer to {prompt.key[:60]!r}")
    model = next(iter(answers)) if len(answers) == 1 else BASELINE_MODELS.get(prompt.prompt.facts.get("category", ""))
    if model not in answers:
        raise ConfigError(
            f"{where}: answers of {', '.join(answers)[:100]} to {prompt.key[:60]!r}; give one for each prompt"
        )
    wanted, found = 1 + len(prompt.prompt.follow_ups), len(answers[model].get("responses", [model]))
    if found < wanted:
        raise ConfigError(f"{where}: {found} answer to the {wanted} turns of {prompt.key[:60]!r}")
    return answers[model]


def _prompt(row: dict[str, Any], where: str, num_turns: int) -> EvaluationPrompt:
    if row.get("turns") is None:
        text: Any = next((row[name] for name in _TEXT_FIELDS if row.get(name) is not None), None)
        if text is None:
            raise ConfigError(f"{where}: needs {_listed(('turns', *_TEXT_FIELDS))}; it has {list_columns(row)}")
        texts = [text]
    else:
        texts = _turns(row["turns"])
        if not 1 <= len(texts) <= num_turns:
            most = "one user message, with its content" if num_turns == 1 else f"one to {num_turns} user messages"
            hint = "; judge=mt_bench and judge=mt_bench_pairwise have a second turn" if num_turns == 1 else ""
            raise ConfigError(f"{where}: turns must be {most}{hint}")
    if not all(isinstance(text, str) and text.strip() for text in texts):
        raise ConfigError(f"{where}: a prompt needs text")
    facts = {"answer": _expected_answer(row), "category": row.get("category")}
    references = row.get("reference")  # of MT-Bench, empty where there is none
    for turn, reference in enumerate(references if isinstance(references, list) else [], 1):
        facts[f"reference_{turn}"] = reference or None
    prompt = text_prompt(texts[0], {name: fact for name, fact in facts.items() if isinstance(fact, str)})
    prompt = replace(prompt, follow_ups=tuple(texts[1:]))
    source = next((row[name] for name in _SOURCE_FIELDS if isinstance(row.get(name), str)), "")
    return EvaluationPrompt(_key(row, where), replace(prompt, source=source))


def _expected_answer(row: dict[str, Any]) -> str | None:
    """Return the answer of a problem: after GSM8K's #### where there is one; that of MATH is in its solution's box."""
    answer = next((row[name] for name in ("answer", "Answer") if isinstance(row.get(name), str | int | float)), None)
    if answer is not None:
        return str(answer).rpartition("####")[2].strip() or None
    solution = row.get("solution")
    return (last_box(solution) or None) if isinstance(solution, str) else None


def _key(row: dict[str, Any], where: str) -> str:
    for name in _KEY_FIELDS:
        if isinstance(row.get(name), str | int):
            return str(row[name])
    raise ConfigError(f"{where}: needs {_listed(_KEY_FIELDS)}; it has {list_columns(row)}")


def _listed(names: Sequence[str]) -> str:
    return f"{', '.join(names[:-1])} or {names[-1]}"


def _turns(value: Any) -> list[Any]:
    """Return the texts of turns, each a text or with its content; None for what is neither. Nothing for no list."""
    turns = value if isinstance(value, list) else []
    return [turn.get("content") if isinstance(turn, dict) else turn for turn in turns]


def _answers(row: dict[str, Any], where: str) -> list[str]:
    """Return the text of the answer, or those of every turn."""
    texts: Any = [next((row[name] for name in _RESPONSE_FIELDS if name in row), None)]
    if (column := next((name for name in _NESTED_ANSWERS if name in row), None)) is not None:
        found = None
        with suppress(LookupError, TypeError):
            found = reduce(getitem, _NESTED_ANSWERS[column], row[column])
        texts = _turns(found) if isinstance(found, list) else [found]
    if not texts or not all(isinstance(text, str) for text in texts):
        names = ", ".join((*_NESTED_ANSWERS, *_RESPONSE_FIELDS))
        raise ConfigError(f"{where}: needs the text of an answer in one of {names}")
    return texts
