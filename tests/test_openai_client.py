"""The concurrent client against a small local server: retries, Retry-After, limits and cancellation."""

import json
import threading
import time
from collections import deque
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest

from src.errors import StageError, one_line
from src.serving.openai_client import ConcurrentClient

COMPLETION = {"id": "x", "object": "text_completion", "created": 0, "model": "m"}


class Endpoint:
    """Completes a prompt with itself. `failures`: (status, headers, body) of the next responses instead."""

    def __init__(self):
        self.failures, self.arrivals, self.in_flight, self.max_in_flight = deque(), [], 0, 0
        lock = threading.Lock()
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_POST(self):
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                with lock:
                    endpoint.arrivals.append(time.monotonic())
                    endpoint.in_flight += 1
                    endpoint.max_in_flight = max(endpoint.max_in_flight, endpoint.in_flight)
                    failure = endpoint.failures.popleft() if endpoint.failures else None
                time.sleep(0.02)
                choice = {"index": 0, "finish_reason": "stop", "text": request["prompt"], "logprobs": None}
                body = json.dumps(COMPLETION | {"choices": [choice]})
                status, headers, body = failure or (200, {}, body)
                with lock:
                    endpoint.in_flight -= 1
                self.send_response(status)
                for name, value in (headers | {"Content-Length": len(body)}).items():
                    self.send_header(name, str(value))
                self.end_headers()
                self.wfile.write(body.encode())

            def log_message(self, *_):
                pass

        self.server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1"


@pytest.fixture
def endpoint():
    endpoint = Endpoint()
    yield endpoint
    endpoint.server.shutdown()
    endpoint.server.server_close()


def complete(endpoint, count=1, on_progress=lambda: None, **options):
    """Return the completions of "0", "1", ... by number."""
    options = {"timeout": 10.0, "max_retries": 2, "concurrency": 3, "grace": 5.0} | options
    client, results = ConcurrentClient(endpoint.url, None, **options), {}

    def request(number, openai_client):
        return openai_client.completions.create(model="m", prompt=str(number))

    requests = ((number, partial(request, number)) for number in range(count))
    client.map_concurrent(requests, lambda completion: completion.choices[0].text, results.__setitem__, on_progress)
    return results


def test_every_request_has_its_result_and_no_more_than_the_limit_are_in_flight(endpoint):
    assert complete(endpoint, count=12) == {number: str(number) for number in range(12)}
    assert endpoint.max_in_flight == 3 and len(endpoint.arrivals) == 12


@pytest.mark.parametrize("failure", [(503, {}, ""), (429, {}, ""), (200, {}, "<html>"), (200, {}, '{"choices": []}')])
def test_a_failure_that_may_pass_is_retried(endpoint, failure):
    endpoint.failures.append(failure)
    assert complete(endpoint) == {0: "0"}
    assert len(endpoint.arrivals) == 2


def test_a_retry_waits_as_long_as_the_endpoint_asks_for(endpoint):
    endpoint.failures.append((429, {"Retry-After": 1}, ""))
    assert complete(endpoint) == {0: "0"}
    first, second = endpoint.arrivals
    assert second - first >= 1


@pytest.mark.parametrize(
    ("failure", "message", "num_requests"),
    [
        ((503, {}, '{"error": {"message": "busy"}}'), "failed after 2 attempts: .*503.*busy", 2),
        ((200, {}, '{"choices": []}'), "failed after 2 attempts: the response is not a completion", 2),
        ((401, {}, '{"error": {"message": "no such key"}}'), "failed after 1 attempt: .*401.*no such key", 1),
        ((400, {}, json.dumps({"error": {"message": "too long " * 99}})), "failed after 1 attempt: .*400.*too long", 1),
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
    endpoint.failures.append((503, {"Retry-After": 2}, ""))
    results, sent = {}, []

    def requests():
        for number in range(3):
            sent.append(number)
            yield number, lambda client, number=number: client.completions.create(model="m", prompt=str(number))

    def interrupt():
        raise KeyboardInterrupt

    client = ConcurrentClient(endpoint.url, None, timeout=10, max_retries=5, concurrency=3, grace=5)
    with pytest.raises(KeyboardInterrupt):
        client.map_concurrent(requests(), lambda c: c.choices[0].text, results.__setitem__, interrupt)
    assert sent == [0, 1, 2] and len(results) == 2
    assert len(endpoint.arrivals) == 3  # no retry after the cancellation
