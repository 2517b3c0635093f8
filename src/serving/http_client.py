"""The HTTP client of one endpoint: the key goes nowhere else, and what comes back is bounded in size and time."""

from __future__ import annotations

import base64
import json
import logging
import os
import re
import threading
import time
from collections.abc import Callable
from typing import Any
from urllib.parse import quote, urljoin, urlsplit

import openai

from src.config.endpoints import OPENAI_URL, is_loopback

LARGEST_RESPONSE = 4 * 2**20  # bytes, decompressed; an answer of 4096 tokens has about 2**14
SHORTEST_KEY = 8  # characters; a shorter one, such as `none`, is a common word, and no secret
KEY_STRUCK_OUT = "[key]"

# Their lines about every request repeat what the endpoint says, which may be the key.
for name in ("httpx", "httpx2"):
    logging.getLogger(name).setLevel(logging.WARNING)


class MalformedResponse(ValueError):
    """A response that is no completion; the message says why."""


class EndpointHttpClient(openai.DefaultHttpxClient):
    """Sends requests with this key, or without any, whatever the openai client reads from its environment.

    A redirect is an error: another server would see the question and answer it. Each thread finds its latest response,
    a JSON value or None, in `latest`.
    """

    def __init__(self, url: str, key: str | None, time_limit: float, before_send: Callable[[Any], None]) -> None:
        super().__init__(trust_env=not is_loopback(url))  # HTTP proxies are not for loopback addresses
        self._address, self._key, self._time_limit, self._before_send = url, key, time_limit, before_send
        self._thread = threading.local()

    @property
    def latest(self) -> Any:
        return getattr(self._thread, "latest", None)

    def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
        """Return the whole response. Raises MalformedResponse for one that is too long or too slow."""
        self._before_send(request)
        self._set_headers(request.headers)
        response = super().send(request, stream=True, **(options | {"follow_redirects": False}))
        try:
            if response.has_redirect_location:
                host = urlsplit(urljoin(self._address, response.headers["location"])).hostname
                message = f"the endpoint redirects to {host}; set judge.base_url to the server that answers"
                raise openai.APIConnectionError(message=message, request=request)
            content, deadline = bytearray(), time.monotonic() + self._time_limit
            for chunk in response.iter_bytes():
                content += chunk
                if len(content) > LARGEST_RESPONSE:
                    raise MalformedResponse(f"the response is longer than {LARGEST_RESPONSE // 2**20} MiB")
                if time.monotonic() > deadline:
                    raise MalformedResponse(f"the response did not end within {self._time_limit:g} s of its beginning")
        finally:
            response.close()
        self._thread.latest = _parse(content)
        encoding = ("content-encoding", "content-length", "transfer-encoding")  # of what is decoded by now
        headers = [(name, value) for name, value in response.headers.multi_items() if name.lower() not in encoding]
        return type(response)(response.status_code, headers=headers, content=bytes(content), request=request)

    def _set_headers(self, headers: Any) -> None:
        if self._address != OPENAI_URL:  # what the environment has for OpenAI
            custom = re.findall(r"^\s*([^:\n]+?)\s*:", os.environ.get("OPENAI_CUSTOM_HEADERS", ""), re.MULTILINE)
            for name in ("OpenAI-Organization", "OpenAI-Project", *custom):
                headers.pop(name, None)
        headers.pop("Authorization", None)
        if self._key is not None:
            headers["Authorization"] = f"Bearer {self._key}"


def _parse(content: bytes | bytearray) -> Any:
    try:
        return json.loads(content)
    except (ValueError, RecursionError):
        return None


def strike_out(text: str, key: str | None) -> str:
    """Return the text without the key, be it as it is or as JSON, Python, URLs or base64 write it."""
    if key is None or len(key) < SHORTEST_KEY:
        return text
    forms = {key, json.dumps(key)[1:-1], repr(key)[1:-1], quote(key, safe="")}
    for offset in range(3):  # base64 writes three bytes as four letters; the key may begin at any of the three
        encoded = base64.b64encode(b"\0" * offset + key.encode()).decode()
        inside = encoded[(4 * offset + 2) // 3 : 4 * (offset + len(key)) // 3]  # letters that only the key decides
        forms |= {inside, inside.replace("+", "-").replace("/", "_")}
    pattern = "|".join(re.escape(form) for form in sorted(forms, key=len, reverse=True))
    return re.sub(pattern, KEY_STRUCK_OUT, text, flags=re.IGNORECASE)
