"""Questions to a judge's endpoint: each is asked once, within a budget, and its answer is kept."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import openai

from src.config.endpoints import read_key
from src.config.judge import JudgeEndpoint
from src.errors import ConfigError, StageError
from src.hardware import release_accelerator
from src.judges.answers import Answers, Shape, is_number, is_text
from src.planning.content import digest
from src.planning.identity import JudgeInputs
from src.serving.http_client import MalformedResponse, strike_out
from src.serving.model_server import serving
from src.serving.openai_client import ConcurrentClient
from src.store.attempt import Attempt

log = logging.getLogger(__name__)

Messages = list[dict[str, str]]  # of a chat, as in OpenAI's API

# What every answer of an endpoint has. model: as the endpoint called it, maybe a dated one, or null.
ENDPOINT_SHAPE: Shape = {
    "prompt_tokens": lambda value: is_number(value) and value >= 0,
    "completion_tokens": lambda value: is_number(value) and value >= 0,
    "model": lambda value: value is None or is_text(value),
    "date": is_text,
    "by": is_text,
}

TEXT_SHAPE: Shape = {"text": is_text}

CHARS_PER_TOKEN = 3.0  # at least, in text of most languages; bounds the cost of a question before it is asked


class Question(NamedTuple):
    request: Callable[[openai.OpenAI], Any]
    num_chars: int  # that the judge reads


class JudgeClient:
    """shape: what an answer has beside ENDPOINT_SHAPE."""

    def __init__(
        self, judge: JudgeInputs, endpoint: JudgeEndpoint, output_dir: Path, shape: Shape = TEXT_SHAPE
    ) -> None:
        self._judge, self._endpoint = judge, endpoint
        self.answers = Answers.of_judge(judge, output_dir, {**ENDPOINT_SHAPE, **shape})
        try:
            self._key = read_key(endpoint)
        except ConfigError as error:  # the environment of the job is not that of the command
            raise StageError(str(error)) from None

    def complete(self, chats: Sequence[Messages], attempt: Attempt) -> list[dict[str, Any]]:
        """Return one answer per chat: text, prompt_tokens, completion_tokens, model, date, `by`: the stage that asked.

        Equal chats have the same answer. Raises what `ask_missing` does.
        """
        keys = [self.key(self._judge.temperature, self._judge.max_tokens, chat) for chat in chats]
        questions = {
            key: Question(partial(self._request, chat), sum(len(message["content"]) for message in chat))
            for key, chat in zip(keys, chats, strict=True)
        }
        self.ask_missing(questions, self._parse_completion, attempt)
        return [self.answers.known[key] for key in keys]

    def key(self, *question: Any) -> str:
        """Return the key of an answer. question: all that it depends on, besides the model.

        Asked again, a question has another key.
        """
        return digest([*question, *([self._judge.repeat] if self._judge.repeat else [])])

    def ask_missing(
        self, questions: Mapping[str, Question], parse: Callable[[Any], dict[str, Any] | None], attempt: Attempt
    ) -> None:
        """Ask the questions whose key has no answer yet, and keep what parse(response) returns, unless it is None.

        To that are added `by` and the date. A response that parse raises MalformedResponse for is requested again.

        Raises StageError when the endpoint refuses, keeps failing or the budget is spent, and whatever attempt.step
        raises. Answers that arrive until then are kept, also those of requests in flight: they are paid for.
        """
        known = self.answers.known
        self.answers.refresh()
        if all(key in known for key in questions):
            return  # no server is started for nothing

        def requests(client: ConcurrentClient) -> Iterator[tuple[str, Callable[[openai.OpenAI], Any]]]:
            for key, question in questions.items():
                self.answers.refresh()  # another process may have asked meanwhile
                if key not in known:
                    self._check_budget(question.num_chars, client.num_in_flight)
                    yield key, question.request

        def on_result(key: str, answer: dict[str, Any] | None) -> None:
            if answer is not None:
                now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
                self.answers.add(key, answer | {"date": now, "by": attempt.identity})

        def num_known() -> int:
            return sum(key in known for key in questions)

        def on_progress() -> None:
            attempt.step(num_known(), len(questions))

        try:
            with self._connected(attempt, on_progress) as client:
                client.map_concurrent(requests(client), parse, on_result, on_progress)
        except StageError as error:
            raise StageError(
                f"judge.model={self._judge.model_name}: {error}; {num_known()} of {len(questions)} answers were saved; "
                "rerun to request the remaining ones"
            ) from None

    @contextmanager
    def _connected(self, attempt: Attempt, on_progress: Callable[[], None]) -> Iterator[ConcurrentClient]:
        """Have a client of the endpoint in the body; where the job serves the model itself, its server runs meanwhile.

        It computes in bf16: judges are served to be asked, and what they compute is no result of the run's precision.
        """
        judge, endpoint, url = self._judge, self._endpoint, self._endpoint.base_url
        with ExitStack() as stack:
            if judge.server is not None:
                folder = attempt.checkpoints / "judge"
                folder.mkdir(parents=True, exist_ok=True)
                release_accelerator()  # a server allocates the memory that is free when it starts
                command, timeout, model = judge.server[1], endpoint.server_timeout, judge.asked_name
                with attempt.loading():
                    url = stack.enter_context(serving(command, timeout, model, "bf16", folder, on_progress))
            limits = endpoint.timeout, endpoint.max_retries, endpoint.concurrency
            yield ConcurrentClient(url, self._key, *limits, grace=endpoint.timeout)

    def _request(self, chat: Messages, client: openai.OpenAI) -> Any:
        judge = self._judge
        assert judge.temperature is not None and judge.max_tokens is not None
        return client.chat.completions.create(
            model=judge.model_name,
            messages=chat,  # type: ignore[arg-type]
            temperature=judge.temperature,
            max_tokens=judge.max_tokens,
        )

    def _parse_completion(self, completion: Any) -> dict[str, Any]:
        text, tokens = read_content(completion.choices[0].message.content), read_usage(completion.usage)
        return {"text": strike_out(text, self._key), **tokens, "model": self.read_model(completion.model)}

    def read_model(self, model: Any) -> str | None:
        """Return the name that the endpoint gave its model; None without one."""
        return strike_out(model, self._key)[:200] if isinstance(model, str) else None

    def _check_budget(self, num_chars: int, in_flight: int) -> None:
        """Raise StageError when one more answer may exceed the budget, with requests in flight at their full length.

        Requests that other processes have in flight are not known here.
        """
        endpoint, num_calls = self._endpoint, len(self.answers.known)
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


def read_content(content: Any) -> str:
    """Return the text of an answer: all text parts, where a provider sends a list; empty for a refusal.

    Raises MalformedResponse for anything else.
    """
    if content is None:
        return ""
    parts = content if isinstance(content, list) else [content]
    texts = [part.get("text", "") if isinstance(part, dict) else part for part in parts]  # parts may be of thinking
    if not all(isinstance(text, str) for text in texts):
        raise MalformedResponse("the response is not a completion (its content is not text)")
    return "".join(texts)


def read_usage(usage: Any) -> dict[str, int]:
    """Return the numbers of tokens; 0 for what is no number of tokens, since the answer itself is paid for."""
    counts: dict[str, Any] = {name: getattr(usage, name, None) for name in ("prompt_tokens", "completion_tokens")}
    return {name: int(n) if is_number(n) and n >= 0 else 0 for name, n in counts.items()}


def usage_of(
    endpoint: JudgeEndpoint, answers: Sequence[dict[str, Any] | None], attempt: Attempt, unparsable: int
) -> dict[str, Any]:
    """Return the number of answers, and the calls, tokens and dollars of those that this stage asked for.

    models: all names that the endpoint gave the model. answered: dates of the first and the last answer. Logs how many
    are unparsable, as a warning when they are more than a tenth.
    """
    if unparsable:
        level = logging.WARNING if 10 * unparsable > len(answers) else logging.INFO
        log.log(level, "%s: %d of %d answers of the judge have no verdict", attempt.label, unparsable, len(answers))
    distinct = list({id(answer): answer for answer in answers if answer is not None}.values())  # equal ones share one
    asked = [answer for answer in distinct if answer["by"] == attempt.identity]
    tokens = {name: sum(answer[name] for answer in asked) for name in ("prompt_tokens", "completion_tokens")}
    counts = {"answers": len(answers), "calls": len(asked), "unparsable": unparsable}
    models = sorted({answer["model"] for answer in distinct if answer["model"] is not None})
    dates = sorted(answer["date"] for answer in distinct)
    provenance = {"models": models, "answered": [dates[0], dates[-1]] if dates else []}
    return {**counts, **tokens, "cost": cost(endpoint, tokens), **provenance}


def cost(endpoint: JudgeEndpoint, tokens: Mapping[str, float]) -> float:
    """Return the dollars for prompt_tokens and completion_tokens; a price that is not set counts as 0."""
    prices = (("prompt_tokens", endpoint.input_price), ("completion_tokens", endpoint.output_price))
    return sum(tokens[name] * (price or 0.0) / 1e6 for name, price in prices)
