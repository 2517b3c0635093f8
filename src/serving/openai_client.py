"""An OpenAI-compatible endpoint asked many things at once, with patience for its faults."""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, as_completed, wait
from contextlib import suppress
from itertools import islice
from typing import Any, TypeVar
from urllib.parse import urlsplit

import openai
import tenacity

from src.errors import StageError

K = TypeVar("K", bound=Hashable)
T = TypeVar("T")

LONGEST_PAUSE = 60.0  # seconds between two attempts


class Malformed(Exception):
    """The endpoint answered with something that is no completion."""


def _passes(error: BaseException) -> bool:
    """Whether the same request may well be answered a little later."""
    if isinstance(error, openai.RateLimitError):
        return error.code != "insufficient_quota"
    if isinstance(error, openai.APIStatusError):
        return error.status_code >= 500 or error.status_code in (408, 409)
    return isinstance(error, (openai.APIConnectionError, Malformed))


_doubling = tenacity.wait_random_exponential(multiplier=1, max=LONGEST_PAUSE)


def _pause(state: tenacity.RetryCallState) -> float:
    """As long as the endpoint asks for, else twice as long as before with some chance in it, so that requests that
    failed together do not come back together."""
    error = state.outcome.exception() if state.outcome else None
    if isinstance(error, openai.APIStatusError):
        with suppress(KeyError, ValueError):
            return min(LONGEST_PAUSE, max(0.0, float(error.response.headers["retry-after"])))
    return _doubling(state)


class _Stopped(Exception):
    """Nobody waits for this request any more."""


class Remote:
    """key: none for a server that wants none. attempts: at each request. grace: seconds that requests under way are
    waited for when something goes wrong, for they may be paid for."""

    def __init__(
        self, base_url: str | None, key: str | None, timeout: float, attempts: int, concurrency: int, grace: float
    ) -> None:
        # A proxy for the world does not know this machine.
        local = base_url is not None and urlsplit(base_url).hostname in ("127.0.0.1", "localhost", "::1")
        # The client refuses to start without a key, and retries in a way that cannot be stopped.
        self.client = openai.OpenAI(
            base_url=base_url,
            api_key=key or "none",
            timeout=timeout,
            max_retries=0,
            http_client=openai.DefaultHttpxClient(trust_env=not local),
        )
        self.url = str(self.client.base_url).rstrip("/")
        self._attempts, self._concurrency, self._grace = attempts, concurrency, grace
        self._running: dict[Future[Any], Any] = {}  # -> key

    @property
    def running(self) -> int:
        """Requests under way."""
        return len(self._running)

    def each(
        self,
        requests: Iterable[tuple[K, Callable[[openai.OpenAI], Any]]],
        read: Callable[[Any], T],
        keep: Callable[[K, T], None],
        beat: Callable[[], None],
    ) -> None:
        """Send every request, keep(key, read(completion)) whatever comes, in any order; beat() about twice a second.

        read: from a completion, as the client has it, to what is kept; what it cannot find there counts as malformed.
        Raises StageError when the endpoint refuses or keeps failing, and whatever beat raises or the iterable of
        requests does; before that, what was under way and comes within the time of grace is kept.
        """
        waiting, running = iter(requests), self._running
        stopping = threading.Event()
        pool = ThreadPoolExecutor(self._concurrency)
        try:
            while True:
                for key, request in islice(waiting, self._concurrency - len(running)):
                    running[pool.submit(self._patiently, request, read, stopping)] = key
                if not running:
                    break
                for future in wait(running, timeout=0.5, return_when=FIRST_COMPLETED).done:
                    keep(running[future], future.result())
                    del running[future]
                beat()
        except (openai.APIError, Malformed) as error:
            raise StageError(self._explained(error)) from error
        finally:
            stopping.set()
            with suppress(TimeoutError):
                for future in as_completed(list(running), timeout=self._grace):
                    key = running.pop(future)
                    if future.exception() is None:
                        keep(key, future.result())
            running.clear()
            pool.shutdown(wait=False, cancel_futures=True)

    def _patiently(self, request: Callable[[openai.OpenAI], Any], read: Callable[[Any], T], stopping: Any) -> T:
        def sleep(seconds: float) -> None:
            if stopping.wait(seconds):
                raise _Stopped

        retrying = tenacity.Retrying(
            retry=tenacity.retry_if_exception(_passes),
            stop=tenacity.stop_after_attempt(self._attempts),
            wait=_pause,
            sleep=sleep,
            reraise=True,
        )
        return retrying(self._once, request, read)

    def _once(self, request: Callable[[openai.OpenAI], Any], read: Callable[[Any], T]) -> T:
        try:
            return read(request(self.client))
        except (ValueError, openai.APIResponseValidationError, AttributeError, IndexError, TypeError) as error:
            raise Malformed(f"the answer is no completion ({type(error).__name__})") from error

    def _explained(self, error: Exception) -> str:
        what = f"gives no answer in {self._attempts} attempts" if _passes(error) else "refuses"
        return f"{self.url} {what}: {' '.join(str(error).split())[:300]}"
