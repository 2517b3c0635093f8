"""A loopback W&B server for the real client (0.31), with the part of the protocol that this project uses.

It was recorded from that client: resumed runs, history, summary, files, tables, artifacts and views. Everything that is
uploaded stays in memory, for tests to compare.
"""

from __future__ import annotations

import gzip
import json
import re
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any
from urllib.parse import quote, unquote

KEY = "c0ffee" + "0" * 34


@dataclass
class Run:
    project: str
    name: str
    display: str = ""
    group: str | None = None
    job_type: str | None = None
    tags: list[str] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)
    summary: dict[str, Any] = field(default_factory=dict)
    history: list[dict[str, Any]] = field(default_factory=list)
    files: dict[str, bytes] = field(default_factory=dict)
    num_finished: int = 0  # how often the client reported the run as complete
    index: int = 0  # in order of creation

    @property
    def steps(self) -> list[int]:
        return [row["train/step"] for row in self.history if "train/step" in row]

    def listed(self) -> dict[str, Any]:
        """Return the run as it appears in a list of runs."""
        bucket = {name: value for name, value in self.bucket().items() if not name.startswith(("config", "summary"))}
        times = dict.fromkeys(("createdAt", "heartbeatAt"), f"2026-01-01T00:00:{self.index:02d}Z")
        user = {"name": "me", "username": "me"}
        more = {"projectId": "1", "state": "finished", "commit": None, "readOnly": False, "user": user}
        return {**bucket, **times, **more}

    def bucket(self) -> dict[str, Any]:
        return {
            "id": f"id-{self.name}",
            "name": self.name,
            "displayName": self.display,
            "description": None,
            "notes": None,
            "config": json.dumps(self.config),
            "sweepName": None,
            "tags": self.tags,
            "jobType": self.job_type,
            "group": self.group,
            "project": {"id": "project", "name": self.project, "entity": {"id": "entity", "name": "me"}},
            "historyLineCount": len(self.history),
            "eventsLineCount": 0,
            "logLineCount": 0,
            "summaryMetrics": json.dumps(self.summary),
            "historyTail": json.dumps([json.dumps(row) for row in self.history[-1:]]),
            "eventsTail": "[]",
            "wandbConfig": json.dumps({"t": 1}),
        }


class WandbServer:
    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.artifacts: dict[str, dict[str, Any]] = {}
        self.views: dict[str, dict[str, Any]] = {}  # workspace views and reports
        self.requests: list[tuple[str, bytes]] = []  # method and path, body
        self.refuse: int | None = None  # status code of every response; -1: connections are closed without one
        self.lock = threading.Lock()
        self._server = _Server(("127.0.0.1", 0), type("Handler", (_Handler,), {"owner": self}))
        self.port = self._server.server_address[1]
        self.url = f"http://127.0.0.1:{self.port}"
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    @property
    def environment(self) -> dict[str, str]:
        return {"WANDB_BASE_URL": self.url, "WANDB_API_KEY": KEY}

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()

    def run(self, project: str, name: str) -> Run:
        return self.runs.setdefault(name, Run(project, name, index=len(self.runs)))

    # GraphQL operations, by name. Each takes the variables of the request.

    def op_viewer(self, _: dict[str, Any]) -> dict[str, Any]:
        me = {"id": "user", "entity": "me", "username": "me", "name": "me", "email": "me@here", "flags": "{}"}
        return {"viewer": {**me, "admin": False, "teams": {"edges": []}, "apiKeys": {"edges": []}}}

    def op_server_features_query(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"serverInfo": {"features": []}}

    def op_organization_core_weave_organization_id(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"entity": {"organization": None}}

    def op_run_resume_status(self, variables: dict[str, Any]) -> dict[str, Any]:
        known = self.runs.get(variables["name"])
        project = {"id": "project", "name": variables["project"], "entity": {"id": "entity", "name": "me"}}
        return {"model": {**project, "bucket": known and known.bucket()}}

    def op_upsert_bucket(self, variables: dict[str, Any]) -> dict[str, Any]:
        new, run = variables["name"] not in self.runs, self.run(variables["project"], variables["name"])
        run.display, run.group = variables["displayName"] or run.display, variables["groupName"] or run.group
        run.job_type, run.tags = variables["jobType"] or run.job_type, variables["tags"] or run.tags
        run.config = json.loads(variables["config"]) if variables["config"] else run.config
        return {"upsertBucket": {"bucket": run.bucket(), "inserted": new}}

    def op_create_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/storage/runs/{variables['run']}"
        files = [{"name": name, "uploadUrl": f"{url}/{name}"} for name in variables["files"]]
        return {"createRunFiles": {"runID": f"id-{variables['run']}", "uploadHeaders": [], "files": files}}

    def op_artifact_type(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"artifact": None}}

    def op_create_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        identity = f"artifact{len(self.artifacts)}"
        self.artifacts[identity] = {**variables["input"], "files": {}, "committed": False}
        created = {"id": identity, "state": "PENDING", "artifactSequence": {"latestArtifact": None}}
        return {"createArtifact": {"artifact": created}}

    def op_create_artifact_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        edges = []
        for file in variables["input"]["artifactFiles"]:
            url = f"{self.url}/storage/artifacts/{file['artifactID']}/{file['name']}"
            edges.append({"node": {**_file(file["name"], url), "artifact": {"id": file["artifactID"]}}})
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def op_create_artifact_manifest(self, variables: dict[str, Any]) -> dict[str, Any]:
        url = f"{self.url}/storage/artifacts/{variables['artifactID']}/wandb_manifest.json"
        created = {"id": f"manifest-{variables['artifactID']}", "file": _file("wandb_manifest.json", url)}
        return {"createArtifactManifest": {"artifactManifest": created}}

    op_update_artifact_manifest = op_create_artifact_manifest

    def op_commit_artifact(self, variables: dict[str, Any]) -> dict[str, Any]:
        self.artifacts[variables["artifactID"]]["committed"] = True
        return {"commitArtifact": {"artifact": {"id": variables["artifactID"], "digest": "digest"}}}

    def op_get_default_entity(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"viewer": {"id": "user", "entity": "me"}}

    def op_runs(self, variables: dict[str, Any]) -> dict[str, Any]:
        """Support the one filter that is used here, the group, and pages."""
        filters = json.loads(variables["filters"])
        assert set(filters) <= {"group"}
        runs = [run for run in self.runs.values() if run.project == variables["project"]]
        runs = [run for run in runs if "group" not in filters or run.group == filters["group"]]
        begin = int(variables.get("cursor") or 0)
        end = min(len(runs), begin + variables["perPage"])
        edges = [{"node": run.listed(), "cursor": str(begin + i + 1)} for i, run in enumerate(runs[begin:end])]
        page = {"endCursor": str(end), "hasNextPage": end < len(runs)}
        project = {"internalId": "1", "runCount": len(runs), "readOnly": False}
        return {"project": {**project, "runs": {"edges": edges, "pageInfo": page}}}

    def op_run_files(self, variables: dict[str, Any]) -> dict[str, Any]:
        files, names = self.runs[variables["name"]].files, variables.get("fileNames")
        edges = []
        for name, content in files.items():
            if names and name not in names:
                continue
            url = f"{self.url}/storage/runs/{variables['name']}/{quote(name)}"
            more = {"sizeBytes": len(content), "mimetype": "text/plain", "updatedAt": None, "md5": None}
            edges.append({"node": {"id": name, "name": name, "url": url, "directUrl": url, **more}, "cursor": name})
        page = {"endCursor": None, "hasNextPage": False}
        run = {"fileCount": len(files), "files": {"edges": edges, "pageInfo": page}}
        return {"project": {"internalId": "1", "run": run}}

    def op_get_projects(self, variables: dict[str, Any]) -> dict[str, Any]:
        node = {"__typename": "Project", "createdAt": "2026-01-01T00:00:00Z", "isBenchmark": False, "user": None}
        names = dict.fromkeys(run.project for run in self.runs.values())
        edges = [{"node": {**node, "id": name, "name": name, "entityName": variables["entity"]}} for name in names]
        page = {"__typename": "PageInfo", "endCursor": None, "hasNextPage": False}
        return {"models": {"pageInfo": page, "edges": edges}}

    def op_project_internal_id(self, _: dict[str, Any]) -> dict[str, Any]:
        return {"project": {"id": "project", "internalId": "1"}}

    def op_upsert_view(self, variables: dict[str, Any]) -> dict[str, Any]:
        new = variables.get("id") is None
        identity = f"view{len(self.views)}" if new else variables["id"]
        self.views[identity] = {**variables, "spec": json.loads(variables["spec"])}
        project = {"id": "project", "name": variables["projectName"], "entityName": variables["entityName"]}
        names = {name: variables.get(name) for name in ("type", "name", "displayName", "description", "spec")}
        view = {"id": identity, "project": project, "updatedAt": None, **names}
        return {"upsertView": {"view": view, "inserted": new}}

    op_upsert_view2 = op_upsert_view

    def stream(self, run: Run, body: dict[str, Any]) -> None:
        for name, part in (body.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                # At the client's offset: rows that are sent again after a lost response replace themselves.
                assert part["offset"] <= len(run.history), "a gap"
                run.history[part["offset"] : part["offset"] + len(part["content"])] = map(json.loads, part["content"])
            elif name == "wandb-summary.json":
                run.summary.update(json.loads(part["content"][-1]))
        run.num_finished += bool(body.get("complete"))


def _file(name: str, url: str) -> dict[str, Any]:
    file = {"id": name, "name": name, "displayName": name, "uploadUrl": url, "uploadHeaders": []}
    return {**file, "uploadMultipartUrls": None, "storagePath": name}


class _Server(ThreadingHTTPServer):
    daemon_threads = True
    request_queue_size = 128  # the client opens many connections at once

    def handle_error(self, request: Any, client_address: Any) -> None:
        if not isinstance(sys.exc_info()[1], ConnectionError):  # the client was killed
            super().handle_error(request, client_address)


class _Handler(BaseHTTPRequestHandler):
    owner: WandbServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        pass

    def _body(self) -> bytes:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        body = gzip.decompress(body) if self.headers.get("Content-Encoding") == "gzip" else body
        with self.owner.lock:
            self.owner.requests.append((f"{self.command} {self.path}", body))
        return body

    def _answer(self, content: Any, status: int = 200) -> None:
        data = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def do_GET(self) -> None:
        self._body()
        parts = self.path.split("/", 4)
        run = self.owner.runs.get(parts[3]) if parts[1:3] == ["storage", "runs"] else None
        data = run and run.files.get(unquote(parts[4]))
        if data is None:
            return self._answer({}, 404)
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)
        return None

    def do_POST(self) -> None:
        body = self._body()
        if self.owner.refuse == -1:
            self.close_connection = True
        elif self.owner.refuse is not None:
            self._answer({"error": "refused"}, self.owner.refuse)
        elif self.path == "/graphql":
            request = json.loads(body)
            name = re.search(r"(?:query|mutation)\s+(\w+)", request["query"])[1]
            operation = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name).lower()
            with self.owner.lock:
                self._answer({"data": getattr(self.owner, f"op_{operation}")(request.get("variables") or {})})
        elif match := re.fullmatch(r"/files/[^/]*/([^/]+)/([^/]+)/file_stream", self.path):
            with self.owner.lock:
                self.owner.stream(self.owner.run(match[1], match[2]), json.loads(body))
            self._answer({"limits": {}})
        else:
            self._answer({})  # telemetry of the client

    def do_PUT(self) -> None:
        body = self._body()
        _, _, kind, owner, name = self.path.split("/", 4)
        with self.owner.lock:
            if kind == "runs":
                self.owner.runs[owner].files[unquote(name)] = body
            else:
                self.owner.artifacts[owner]["files"][name] = body
        self._answer({})


@contextmanager
def serving() -> Iterator[WandbServer]:
    server = WandbServer()
    try:
        yield server
    finally:
        server.close()
