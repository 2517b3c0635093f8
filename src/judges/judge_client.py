"""Questions to a judge's endpoint: each is asked once, within a budget, and its answer is kept."""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import openai

from src.config.schema import JudgeEndpoint
from src.errors import StageError
from src.judges.answers import Answers
from src.planning.identity import JudgeInputs, digest
from src.serving.openai_client import ConcurrentClient
from src.store.attempt import Attempt

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]  # of a chat, as in OpenAI's API

CHARS_PER_TOKEN = 3.0  # at least, in text of most languages; bounds the cost of a question before it is asked


class Question(NamedTuple):
    request: Callable[[openai.OpenAI], Any]
    num_chars: int  # that the judge reads


class JudgeClient:
    def __init__(self, judge: JudgeInputs, endpoint: JudgeEndpoint, output_dir: Path) -> None:
        self._judge, self._endpoint = judge, endpoint
        self.answers = Answers.of_judge(judge, output_dir)
        key = os.environ.get(endpoint.api_key_env)
        limits = endpoint.timeout, endpoint.max_retries, endpoint.concurrency
        self._client = ConcurrentClient(endpoint.base_url, key, *limits, grace=endpoint.timeout)

    def complete(self, chats: Sequence[Messages], attempt: Attempt) -> list[dict[str, Any]]:
        """Return one answer per chat: text, prompt_tokens, completion_tokens, and `by`, the stage that asked.

        Equal chats have the same answer. Raises what `ask_missing` does.
        """
        keys = [digest([self._judge.temperature, self._judge.max_tokens, chat]) for chat in chats]
        questions = {
            key: Question(partial(self._request, chat), sum(len(message["content"]) for message in chat))
            for key, chat in zip(keys, chats, strict=True)
        }
        self.ask_missing(questions, _parse_completion, attempt)
        return [self.answers.known[key] for key in keys]

    def ask_missing(
        self, questions: Mapping[str, Question], parse: Callable[[Any], dict[str, Any] | None], attempt: Attempt
    ) -> None:
        """Ask the questions whose key has no answer yet, and keep what parse(response) returns, unless it is None.

        Raises StageError when the endpoint refuses, keeps failing or the budget is spent, and whatever attempt.step
        raises. Answers that arrive until then are kept, also those of requests in flight: they are paid for.
        """
        known = self.answers.known

        def requests() -> Iterator[tuple[str, Callable[[openai.OpenAI], Any]]]:
            for key, question in questions.items():
                self.answers.refresh()  # another process may have asked meanwhile
                if key not in known:
                    self._check_budget(question.num_chars)
                    yield key, question.request

        def on_result(key: str, answer: dict[str, Any] | None) -> None:
            if answer is not None:
                self.answers.add(key, answer | {"by": attempt.identity})

        def num_known() -> int:
            return sum(key in known for key in questions)

        try:
            self._client.map_concurrent(requests(), parse, on_result, lambda: attempt.step(num_known(), len(questions)))
        except StageError as error:
            raise StageError(
                f"judge.model={self._judge.model_name}: {error}; {num_known()} of {len(questions)} answers were saved; "
                "rerun to request the remaining ones"
            ) from error

    def _request(self, chat: Messages, client: openai.OpenAI) -> Any:
        judge = self._judge
        assert judge.temperature is not None and judge.max_tokens is not None
        return client.chat.completions.create(
            model=judge.model_name,
            messages=chat,  # type: ignore[arg-type]
            temperature=judge.temperature,
            max_tokens=judge.max_tokens,
        )

    def _check_budget(self, num_chars: int) -> None:
        """Raise StageError when one more answer may exceed the budget, with requests in flight at their full length.

        Requests that other processes have in flight are not known here.
        """
        endpoint, in_flight, num_calls = self._endpoint, self._client.num_in_flight, len(self.answers.known)
        if endpoint.max_calls is not None and num_calls + in_flight >= endpoint.max_calls:
            raise StageError(f"judge.max_calls={endpoint.max_calls} reached; raise the limit to continue")
        if endpoint.max_cost is not None:
            spent = cost(endpoint, self.answers.totals)
            max_answer_tokens = self._judge.max_tokens or 0
            limits = {"prompt_tokens": num_chars / CHARS_PER_TOKEN, "completion_tokens": max_answer_tokens}
            if spent + (in_flight + 1) * cost(endpoint, limits) > endpoint.max_cost:
                raise StageError(
                    f"judge.max_cost={endpoint.max_cost:g} reached ({spent:.3g} spent); raise the limit to continue"
                )


def _parse_completion(completion: Any) -> dict[str, Any]:
    usage = completion.usage
    return {
        "text": completion.choices[0].message.content or "",
        "prompt_tokens": usage.prompt_tokens if usage else 0,
        "completion_tokens": usage.completion_tokens if usage else 0,
    }


def usage_of(
    endpoint: JudgeEndpoint, answers: Sequence[dict[str, Any] | None], attempt: Attempt, unparsable: int
) -> dict[str, float]:
    """Return the number of answers, and the calls, tokens and dollars of those that this stage asked for.

    Logs how many are unparsable, as a warning when they are more than a tenth.
    """
    if unparsable:
        level = logging.WARNING if 10 * unparsable > len(answers) else logging.INFO
        log.log(level, "%s: %d of %d answers of the judge have no verdict", attempt.label, unparsable, len(answers))
    distinct = {id(answer): answer for answer in answers if answer is not None}.values()  # equal questions share one
    asked = [answer for answer in distinct if answer["by"] == attempt.identity]
    tokens = {name: sum(answer[name] for answer in asked) for name in ("prompt_tokens", "completion_tokens")}
    counts = {"answers": len(answers), "calls": len(asked), "unparsable": unparsable}
    return {**counts, **tokens, "cost": cost(endpoint, tokens)}


def cost(endpoint: JudgeEndpoint, tokens: Mapping[str, float]) -> float:
    """Return the dollars for prompt_tokens and completion_tokens; a price that is not set counts as 0."""
    prices = (("prompt_tokens", endpoint.input_price), ("completion_tokens", endpoint.output_price))
    return sum(tokens[name] * (price or 0.0) / 1e6 for name, price in prices)
