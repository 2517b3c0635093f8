"""The concurrent client against a small local server: retries, Retry-After, limits and cancellation."""

import json
import threading
import time
from collections import deque
from functools import partial

import pytest

from src.errors import StageError, one_line
from src.serving.openai_client import ConcurrentClient
from tests.support.endpoint import FakeEndpoint, completion


class Endpoint(FakeEndpoint):
    """Answers a question with itself. `failures`: (status, headers, body) of the next responses instead."""

    def __init__(self):
        super().__init__()
        self.failures, self.arrivals, self.in_flight, self.max_in_flight = deque(), [], 0, 0
        self.lock, self.reply = threading.Lock(), self.echo
        self.meeting = threading.Barrier(1)  # requests that must be in flight at once before any is answered

    def echo(self, question):
        with self.lock:
            self.arrivals.append(time.monotonic())
            self.in_flight += 1
            self.max_in_flight = max(self.max_in_flight, self.in_flight)
            failure = self.failures.popleft() if self.failures else None
        self.meeting.wait(60)
        with self.lock:
            self.in_flight -= 1
        return failure or completion(question)


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.close()


def ask(number, openai_client):
    return openai_client.chat.completions.create(model="m", messages=[{"role": "user", "content": str(number)}])


def content(answer):
    return answer.choices[0].message.content


def complete(endpoint, count=1, on_progress=lambda: None, **options):
    """Return the completions of "0", "1", ... by number."""
    options = {"timeout": 10.0, "max_retries": 2, "concurrency": 3, "grace": 5.0} | options
    client, results = ConcurrentClient(endpoint.url, None, **options), {}
    requests = ((number, partial(ask, number)) for number in range(count))
    client.map_concurrent(requests, content, results.__setitem__, on_progress)
    return results


def test_every_request_has_its_result_and_no_more_than_the_limit_are_in_flight(endpoint):
    endpoint.meeting = threading.Barrier(3)
    assert complete(endpoint, count=12, timeout=60) == {number: str(number) for number in range(12)}
    assert endpoint.max_in_flight == 3 and len(endpoint.arrivals) == 12


@pytest.mark.parametrize(
    "failure", [(503, {}, b""), (429, {}, b""), (200, {}, b"<html>"), (200, {}, b'{"choices": []}')]
)
def test_a_failure_that_may_pass_is_retried(endpoint, failure):
    endpoint.failures.append(failure)
    assert complete(endpoint) == {0: "0"}
    assert len(endpoint.arrivals) == 2


def test_a_retry_waits_as_long_as_the_endpoint_asks_for(endpoint):
    endpoint.failures.append((429, {"Retry-After": "1"}, b""))
    assert complete(endpoint) == {0: "0"}
    first, second = endpoint.arrivals
    assert second - first >= 1


@pytest.mark.parametrize(
    ("failure", "message", "num_requests"),
    [
        ((503, {}, b'{"error": {"message": "busy"}}'), "failed after 2 attempts: .*503.*busy", 2),
        ((200, {}, b'{"choices": []}'), "failed after 2 attempts: the response is not a completion", 2),
        ((401, {}, b'{"error": {"message": "no such key"}}'), "failed after 1 attempt: .*401.*no such key", 1),
        (
            (400, {}, json.dumps({"error": {"message": "too long " * 99}}).encode()),
            "failed after 1 attempt: .*400.*too long",
            1,
        ),
    ],
)
def test_a_lasting_failure_is_one_line_with_the_number_of_attempts(endpoint, failure, message, num_requests):
    endpoint.failures.extend([failure] * 9)
    with pytest.raises(StageError, match=message) as error:
        complete(endpoint, max_retries=1)
    assert one_line(error.value) == str(error.value)  # without its causes, which repeat the endpoint's words
    assert "\n" not in str(error.value) and str(error.value).startswith(endpoint.url)
    assert len(endpoint.arrivals) == num_requests


def test_cancellation_keeps_results_in_flight_and_sends_no_further_request(endpoint):
    """The first request fails and waits for its retry; the others are answered."""
    endpoint.failures.append((503, {"Retry-After": "4"}, b""))
    results, sent = {}, []

    def requests():
        for number in range(3):
            sent.append(number)
            yield number, partial(ask, number)

    def interrupt():
        raise KeyboardInterrupt

    client = ConcurrentClient(endpoint.url, None, timeout=10, max_retries=5, concurrency=3, grace=30)
    with pytest.raises(KeyboardInterrupt):
        client.map_concurrent(requests(), content, results.__setitem__, interrupt)
    assert sent == [0, 1, 2] and len(results) == 2
    assert len(endpoint.arrivals) == 3  # no retry after the cancellation
