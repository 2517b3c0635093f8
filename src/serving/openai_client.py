"""Many requests to an OpenAI-compatible endpoint at once. Retries are the openai client's own."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar

import openai

from src.config.endpoints import OPENAI_URL, normalize_url
from src.errors import StageError
from src.serving.http_client import EndpointHttpClient, MalformedResponse, strike_out

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

FIRST_PAUSE, LONGEST_PAUSE = 0.5, 8.0  # seconds before a malformed response is requested again, as openai's
RETRY_COUNT_HEADER = "x-stainless-retry-count"  # in the client's requests: attempts before this one

# What reading a response raises when it is no completion.
NOT_A_COMPLETION = (
    ValueError,
    AttributeError,
    LookupError,
    TypeError,
    RecursionError,
    openai.APIResponseValidationError,
)


class _Cancelled(BaseException):
    """Ends the retries of a request whose batch was cancelled; like asyncio.CancelledError, it is not an Exception."""


class ConcurrentClient:
    """An openai client with a limit of requests in flight.

    base_url: None for OpenAI's. key: None for a server without one. timeout: seconds for one attempt. max_retries:
    attempts after the first one (connection errors, timeouts, 408, 409, 429 and 5xx), after the pause that the endpoint
    asks for, or 0.5, 1, 2, 4, 8 ... 8 s. grace: seconds to wait for requests in flight when the batch fails, since they
    may be paid for.
    """

    def __init__(
        self, base_url: str | None, key: str | None, timeout: float, max_retries: int, concurrency: int, grace: float
    ) -> None:
        self.url, self._key = OPENAI_URL if base_url is None else normalize_url(base_url), key
        self.client = openai.OpenAI(
            base_url=self.url,
            api_key="none",  # the client refuses to start without one; its HTTP client knows the key
            timeout=timeout,
            max_retries=max_retries,
            http_client=EndpointHttpClient(self.url, key, timeout, self._cancel_retry),
        )
        self._concurrency, self._grace = concurrency, grace
        self._in_flight: dict[Future[Any], Any] = {}  # -> key
        self._cancelled = threading.Event()

    @property
    def num_in_flight(self) -> int:
        return len(self._in_flight)

    def map_concurrent(
        self,
        requests: Iterable[tuple[K, Callable[[openai.OpenAI], Any]]],
        parse: Callable[[Any], T],
        on_result: Callable[[K, T], None],
        on_progress: Callable[[], None],
    ) -> None:
        """Send every request and call on_result(key, parse(completion)) in order of completion.

        on_progress is called about twice a second. Whatever parse cannot find in a completion makes it malformed, which
        is retried as well. Raises StageError when the endpoint refuses or keeps failing, and whatever on_progress or
        the iterable of requests raises; results that arrive within the time of grace are passed on before.
        """
        waiting, in_flight = iter(requests), self._in_flight
        self._cancelled.clear()
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            while True:
                for key, request in islice(waiting, self._concurrency - len(in_flight)):
                    in_flight[pool.submit(self._send, request, parse)] = key
                if not in_flight:
                    break
                for future in wait(in_flight, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    on_result(in_flight[future], future.result())
                    del in_flight[future]
                on_progress()
        except openai.APIError as error:  # one that the client did not retry, or not as often
            raise self._failure(1 + int(error.request.headers.get(RETRY_COUNT_HEADER, 0)), error) from None
        finally:
            self._cancelled.set()
            with suppress(TimeoutError):
                for future in as_completed(list(in_flight), timeout=self._grace):
                    key = in_flight.pop(future)
                    if future.exception() is None:
                        on_result(key, future.result())
            in_flight.clear()
            pool.shutdown(wait=False, cancel_futures=True)

    def _cancel_retry(self, request: Any) -> None:
        if self._cancelled.is_set() and request.headers.get(RETRY_COUNT_HEADER, "0") != "0":
            raise _Cancelled

    def _send(self, request: Callable[[openai.OpenAI], Any], parse: Callable[[Any], T]) -> T:
        for attempt in range(1 + self.client.max_retries):
            if attempt and self._cancelled.wait(min(FIRST_PAUSE * 2 ** (attempt - 1), LONGEST_PAUSE)):
                raise _Cancelled
            try:
                return parse(request(self.client))
            except NOT_A_COMPLETION as error:
                malformed: Exception = error
        if not isinstance(malformed, MalformedResponse):
            malformed = MalformedResponse(f"the response is not a completion ({type(malformed).__name__})")
        raise self._failure(1 + self.client.max_retries, malformed) from None

    def _failure(self, num_attempts: int, error: Exception) -> StageError:
        """Return the error to raise `from None`: its causes have the endpoint's words, and with them maybe the key."""
        attempts = "1 attempt" if num_attempts == 1 else f"{num_attempts} attempts"
        return StageError(f"{self.url} failed after {attempts}: {self.describe(error)}")

    def describe(self, error: Exception) -> str:
        """Return an error in one line, without the key."""
        is_connection = isinstance(error, openai.APIConnectionError) and error.__cause__ is not None
        reason = f"{error} ({error.__cause__})" if is_connection else str(error)
        return " ".join(self.strike_out(reason).split())[:300]

    def strike_out(self, text: str) -> str:
        """Return the endpoint's words without the key."""
        return strike_out(text, self._key)
