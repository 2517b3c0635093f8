"""The questions of a judge: each asked of the endpoint once, within a budget; what is answered is kept."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from typing import TYPE_CHECKING, Any, NamedTuple

from src.errors import StageError
from src.judges.answers import Answers
from src.planning.identity import JudgeInputs, digest
from src.planning.resources import JudgeEndpoint
from src.serving.openai_client import Remote

if TYPE_CHECKING:
    import openai

    from src.store.attempt import Attempt

Messages = list[dict[str, str]]  # of a chat, as OpenAI has them

LETTERS = 3.0  # of a token, at least, in text of most languages


class Question(NamedTuple):
    request: Callable[[openai.OpenAI], Any]
    letters: int  # that the judge reads


class JudgeClient:
    def __init__(self, judge: JudgeInputs, endpoint: JudgeEndpoint, answers: Answers) -> None:
        self._judge, self._endpoint, self._answers = judge, endpoint, answers
        key = os.environ.get(endpoint.api_key_env)
        self._remote = Remote(
            endpoint.base_url, key, endpoint.timeout, endpoint.max_retries, endpoint.concurrency, endpoint.timeout
        )

    def ask(self, questions: Sequence[Messages], attempt: Attempt) -> list[dict[str, Any]]:
        """One answer a question: text, prompt_tokens, completion_tokens, and `by`, the stage that asked; for equal
        questions the same one. Raises what `gather` does."""
        keys = [digest([self._judge.temperature, self._judge.max_tokens, question]) for question in questions]
        distinct = {
            key: Question(partial(self._complete, question), sum(len(message["content"]) for message in question))
            for key, question in zip(keys, questions, strict=True)
        }
        self.gather(distinct, _read, attempt)
        return [self._answers.known[key] for key in keys]

    def gather(
        self, questions: Mapping[str, Question], read: Callable[[Any], dict[str, Any] | None], attempt: Attempt
    ) -> None:
        """Send the questions whose key has no answer yet and keep what read() makes of what comes; None is no answer.

        Raises StageError when the endpoint refuses, keeps failing or the budget is spent, and whatever attempt.step
        raises. Answers that came by then are kept, those under way included: they are paid for.
        """
        known = self._answers.known

        def requests() -> Iterator[tuple[str, Callable[[openai.OpenAI], Any]]]:
            for key, question in questions.items():
                self._answers.refresh()  # another job may have asked meanwhile
                if key not in known:
                    self._check_budget(question.letters)
                    yield key, question.request

        def keep(key: str, answer: dict[str, Any] | None) -> None:
            if answer is not None:
                self._answers.add(key, answer | {"by": attempt.identity})

        def beat() -> None:
            attempt.step(sum(key in known for key in questions), len(questions))

        try:
            self._remote.each(requests(), read, keep, beat)
        except StageError as error:
            kept = sum(key in known for key in questions)
            raise StageError(
                f"judge.model={self._judge.model_name}: {error}; {kept} of {len(questions)} answers were saved; "
                "rerun to request the remaining ones"
            ) from error

    def _complete(self, question: Messages, client: openai.OpenAI) -> Any:
        judge = self._judge
        assert judge.temperature is not None and judge.max_tokens is not None
        return client.chat.completions.create(
            model=judge.model_name,
            messages=question,  # type: ignore[arg-type]
            temperature=judge.temperature,
            max_tokens=judge.max_tokens,
        )

    def _check_budget(self, letters: int) -> None:
        """Raises StageError when one more answer may be one too many, those under way as long as they may get. Those of
        other processes count once they are there."""
        endpoint, running, known = self._endpoint, self._remote.running, len(self._answers.known)
        if endpoint.max_calls is not None and known + running >= endpoint.max_calls:
            raise StageError(f"judge.max_calls={endpoint.max_calls} reached; raise the limit to continue")
        if endpoint.max_cost is not None:
            spent = cost(endpoint, self._answers.totals)
            most = cost(
                endpoint, {"prompt_tokens": letters / LETTERS, "completion_tokens": self._judge.max_tokens or 0}
            )
            if spent + (running + 1) * most > endpoint.max_cost:
                raise StageError(
                    f"judge.max_cost={endpoint.max_cost:g} reached ({spent:.3g} spent); raise the limit to continue"
                )


def _read(completion: Any) -> dict[str, Any]:
    used = completion.usage
    return {
        "text": completion.choices[0].message.content or "",
        "prompt_tokens": used.prompt_tokens if used else 0,
        "completion_tokens": used.completion_tokens if used else 0,
    }


def usage(
    endpoint: JudgeEndpoint, answers: Sequence[dict[str, Any]], attempt: Attempt, unparsable: int
) -> dict[str, float]:
    """What these answers took: how many, and of those this stage asked for how many calls, tokens and dollars."""
    distinct = {id(answer): answer for answer in answers}.values()  # equal questions have one answer
    own = [answer for answer in distinct if answer["by"] == attempt.identity]  # the others were known
    tokens = {name: sum(answer[name] for answer in own) for name in ("prompt_tokens", "completion_tokens")}
    calls = {"answers": len(answers), "calls": len(own), "unparsable": unparsable}
    return {**calls, **tokens, "cost": cost(endpoint, tokens)}


def cost(endpoint: JudgeEndpoint, tokens: Mapping[str, float]) -> float:
    """Dollars for prompt_tokens and completion_tokens; 0 for a price that is not given."""
    prices = (("prompt_tokens", endpoint.input_price), ("completion_tokens", endpoint.output_price))
    return sum(tokens[name] * (price or 0.0) / 1e6 for name, price in prices)
