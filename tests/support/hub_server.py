"""What the Hugging Face Hub does when a folder is uploaded, as far as the client of huggingface_hub asks for it."""

from __future__ import annotations

import base64
import json
import re
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

_REPOSITORY = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(preupload|commit|tree)/main)?$")


class Hub:
    """Keeps repositories in memory: (kind, name) -> path -> content; `private` has the private ones."""

    def __init__(self) -> None:
        self.repositories: dict[tuple[str, str], dict[str, bytes]] = {}
        self.private: set[tuple[str, str]] = set()
        self.tokens: set[str | None] = set()
        self.refused: str | None = None  # name of the repository whose commits are refused
        hub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def do_GET(self) -> None:
                self._answer(*hub.get(self.path))

            def do_POST(self) -> None:
                hub.tokens.add(self.headers.get("Authorization"))
                body = self.rfile.read(int(self.headers["Content-Length"]))
                self._answer(*hub.post(self.path, body))

            def _answer(self, status: int, content: dict[str, Any] | list[dict[str, Any]]) -> None:
                body = json.dumps(content).encode()
                self.send_response(status)
                self.send_header("Content-Type", "application/json")
                self.send_header("Content-Length", str(len(body)))
                if "error" in content:
                    self.send_header("X-Error-Message", content["error"])
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *arguments: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}"

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def get(self, path: str) -> tuple[int, dict[str, Any] | list[dict[str, Any]]]:
        """Answer what is asked about a repository."""
        match = _REPOSITORY.match(path.partition("?")[0])
        if match is None or (match[1], match[2]) not in self.repositories:
            return 404, {"error": f"nothing at {path}"}
        repository = match[1], match[2]
        if match[3] == "tree":
            contents = self.repositories[repository].items()
            return 200, [{"type": "file", "path": name, "size": len(c), "oid": "0" * 40} for name, c in contents]
        files = [{"rfilename": name} for name in self.repositories[repository]]
        return 200, {"id": match[2], "private": repository in self.private, "sha": "0" * 40, "siblings": files}

    def post(self, path: str, body: bytes) -> tuple[int, dict[str, Any]]:
        """Create a repository, say how its files are sent, or take a commit."""
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization']}/{asked['name']}" if asked.get("organization") else f"me/{asked['name']}"
            repository = asked.get("type", "model"), name
            if repository in self.repositories:
                return 409, {"error": "You already created this repo", "url": f"{self.url}/{name}"}
            self.repositories[repository] = {}
            self.private |= {repository} if asked.get("visibility") == "private" else set()
            return 200, {"url": f"{self.url}/{'datasets/' * (repository[0] == 'dataset')}{name}"}
        match = _REPOSITORY.match(path.partition("?")[0])
        assert match is not None, path
        if match[3] == "preupload":
            paths = [file["path"] for file in json.loads(body)["files"]]
            return 200, {"files": [{"path": p, "uploadMode": "regular", "shouldIgnore": False} for p in paths]}
        if match[2] == self.refused:
            return 403, {"error": "Private repository storage limit reached"}
        for line in body.splitlines():
            operation = json.loads(line)
            if operation["key"] == "file":
                file = operation["value"]
                self.repositories[match[1], match[2]][file["path"]] = base64.b64decode(file["content"])
            elif operation["key"] == "deletedFile":
                del self.repositories[match[1], match[2]][operation["value"]["path"]]
        return 200, {"commitUrl": f"{self.url}/{match[2]}/commit/{'1' * 40}", "commitOid": "1" * 40}
