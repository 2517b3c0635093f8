"""The questions of a judge: each asked of the endpoint once, within a budget; what is answered is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any

from src.config import Judge
from src.failure import StageError
from src.identity import digest
from src.judges.answers import Answers
from src.remote import Remote

if TYPE_CHECKING:
    import openai

    from src.store import Attempt

Messages = list[dict[str, str]]  # of a chat, as OpenAI has them

LETTERS = 3.0  # of a token, at least, in text of most languages


class Endpoint:
    def __init__(self, judge: Judge, answers: Answers) -> None:
        self._judge, self._answers = judge, answers
        key = os.environ.get(judge.api_key_env)
        self._remote = Remote(judge.base_url, key, judge.timeout, judge.attempts, judge.concurrency, judge.timeout)

    def ask(self, questions: Sequence[Messages], attempt: Attempt) -> list[dict[str, Any]]:
        """One answer a question: text, prompt_tokens, completion_tokens, and `by`, the stage that asked; for equal
        questions the same one.

        Raises StageError when the endpoint refuses, keeps failing or the budget is spent, and whatever attempt.step
        raises. Answers that came by then are kept, those under way included: they are paid for.
        """
        keys = [digest([self._judge.temperature, self._judge.max_tokens, question]) for question in questions]
        distinct = dict(zip(keys, questions, strict=True))
        known = self._answers.known

        def requests() -> Iterator[tuple[str, Callable[[openai.OpenAI], Any]]]:
            for key, question in distinct.items():
                self._answers.refresh()  # another job may have asked meanwhile
                if key not in known:
                    self._check_budget(question)
                    yield key, partial(self._complete, question)

        def keep(key: str, answer: dict[str, Any]) -> None:
            self._answers.add(key, answer | {"by": attempt.identity})

        def beat() -> None:
            attempt.step(sum(key in known for key in distinct), len(distinct))

        try:
            self._remote.each(requests(), _read, keep, beat)
        except StageError as error:
            kept = sum(key in known for key in distinct)
            raise StageError(
                f"judge.model={self._judge.model}: {error}; {kept} of {len(distinct)} answers are kept, "
                "the same command again asks for the others"
            ) from error
        return [known[key] for key in keys]

    def _complete(self, question: Messages, client: openai.OpenAI) -> Any:
        judge = self._judge
        assert judge.model is not None
        return client.chat.completions.create(
            model=judge.model,
            messages=question,  # type: ignore[arg-type]
            temperature=judge.temperature,
            max_tokens=judge.max_tokens,
        )

    def _check_budget(self, question: Messages) -> None:
        """Raises StageError when one more answer may be one too many, those under way as long as they may get. Those of
        other processes count once they are there."""
        judge, running, known = self._judge, self._remote.running, len(self._answers.known)
        if judge.max_calls is not None and known + running >= judge.max_calls:
            raise StageError(f"judge.max_calls={judge.max_calls} is reached: raise it to go on")
        if judge.max_cost is not None:
            spent = cost(judge, self._answers.totals)
            letters = sum(len(message["content"]) for message in question)
            most = cost(judge, {"prompt_tokens": letters / LETTERS, "completion_tokens": judge.max_tokens})
            if spent + (running + 1) * most > judge.max_cost:
                raise StageError(f"judge.max_cost={judge.max_cost:g} is reached ({spent:.3g} spent): raise it to go on")


def _read(completion: Any) -> dict[str, Any]:
    usage = completion.usage
    return {
        "text": completion.choices[0].message.content or "",
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else 0,
    }


def cost(judge: Judge, tokens: Mapping[str, float]) -> float:
    """Dollars for prompt_tokens and completion_tokens; 0 for a price that is not given."""
    prices = (("prompt_tokens", judge.input_price), ("completion_tokens", judge.output_price))
    return sum(tokens[name] * (price or 0.0) / 1e6 for name, price in prices)
