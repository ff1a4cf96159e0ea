"""A hub on this machine: the part of its HTTP API that uploads use, in memory."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread
from typing import Any

import pytest

TOKEN = "hf_fake"


@dataclass
class Repository:
    """A repository: whether it is private, and its files."""

    private: bool
    files: dict[str, bytes] = field(default_factory=dict)


@dataclass
class FakeHub:
    """What the hub holds, and every request that it got."""

    repositories: dict[str, Repository] = field(default_factory=dict)
    objects: dict[str, bytes] = field(default_factory=dict)
    requests: list[str] = field(default_factory=list)

    def answer(self, method: str, path: str, body: bytes, headers: Any) -> tuple[int, Any]:
        """Status and JSON of a request."""
        self.requests.append(f"{method} {path}")
        if headers.get("authorization") != f"Bearer {TOKEN}" and not path.startswith("/put/"):
            return 401, {"error": "Invalid username or password."}
        if path == "/api/whoami-v2":
            return 200, {"name": "org", "type": "user", "orgs": []}
        if path == "/api/validate-yaml":
            return 200, {"errors": [], "warnings": []}
        if path == "/api/repos/create":
            return self._create(json.loads(body))
        if path.startswith("/put/"):
            return self._put(path.removeprefix("/put/"), body)
        found = re.fullmatch(
            r"(?:/api/models)?/(?P<repo>\w+/[\w-]+?)(?:\.git)?(?P<rest>/.*)?", path
        )
        if found is None or found["repo"] not in self.repositories:
            return 404, {"error": "Repository not found"}
        return self._in(found["repo"], found["rest"] or "", body, headers)

    def _create(self, data: dict[str, Any]) -> tuple[int, Any]:
        name = f"{data.get('organization') or 'org'}/{data['name']}"
        if name in self.repositories:
            return 409, {"error": "You already created this model repo", "url": f"/{name}"}
        private = data.get("private") or data.get("visibility") == "private"
        self.repositories[name] = Repository(bool(private))
        return 200, {"url": f"http://127.0.0.1/{name}"}

    def _put(self, digest: str, body: bytes) -> tuple[int, Any]:
        assert hashlib.sha256(body).hexdigest() == digest
        self.objects[digest] = body
        return 200, {}

    def _in(self, name: str, rest: str, body: bytes, headers: Any) -> tuple[int, Any]:
        repository = self.repositories[name]
        if rest.startswith("/preupload/"):
            files = json.loads(body)["files"]
            modes = [
                {
                    "path": each["path"],
                    "uploadMode": "lfs" if each["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                }
                for each in files
            ]
            return 200, {"files": modes}
        if rest.endswith("/objects/batch"):
            objects = [
                {
                    **each,
                    "actions": {"upload": {"href": f"http://{headers['host']}/put/{each['oid']}"}},
                }
                for each in json.loads(body)["objects"]
            ]
            return 200, {"transfer": "basic", "objects": objects}
        if rest.startswith("/commit/"):
            self._commit(repository, body)
            return 200, {
                "commitUrl": f"http://{headers['host']}/{name}/commit/{'0' * 40}",
                "commitOid": "0" * 40,
            }
        return 200, {"id": name, "private": repository.private, "siblings": [], "sha": "0" * 40}

    def _commit(self, repository: Repository, body: bytes) -> None:
        for line in body.splitlines():
            entry = json.loads(line)
            value = entry["value"]
            if entry["key"] == "file":
                repository.files[value["path"]] = base64.b64decode(value["content"])
            if entry["key"] == "lfsFile":
                repository.files[value["path"]] = self.objects[value["oid"]]


@contextmanager
def fake_hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[FakeHub]:
    """A hub that ``huggingface_hub`` talks to instead of the real one, with a token for it."""
    from huggingface_hub import constants

    hub = FakeHub()

    class Handler(BaseHTTPRequestHandler):
        def _answer(self) -> None:
            body = self.rfile.read(int(self.headers.get("content-length") or 0))
            path = self.path.partition("?")[0]
            status, data = hub.answer(self.command, path, body, self.headers)
            text = json.dumps(data).encode()
            self.send_response(status)
            if status == 404:
                self.send_header("X-Error-Code", "RepoNotFound")
            self.send_header("content-type", "application/json")
            self.send_header("content-length", str(len(text)))
            self.end_headers()
            self.wfile.write(text)

        do_GET = do_POST = do_PUT = do_HEAD = _answer

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    try:
        yield hub
    finally:
        server.shutdown()
        server.server_close()
