"""The part of the Hugging Face hub's HTTP interface that a download uses, on a port of this machine."""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import unquote, urlsplit

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@dataclass
class FakeHub:
    """One repository with one commit, also called main; ``asked`` are the files that were downloaded."""

    repo: str
    folder: Path
    gated: bool = False
    asked: list[str] = field(default_factory=list)
    endpoint: str = ""

    def answer(self, path: str) -> tuple[int, dict[str, str], bytes]:
        """Status, headers and body of a GET."""
        info = f"/api/models/{self.repo}"
        if not path.startswith((f"{info}/", f"/{self.repo}/")) and path != info:
            return 404, {"X-Error-Code": "RepoNotFound"}, b"{}"
        revision = path.removeprefix(info).removeprefix(f"/{self.repo}").split("/")
        if len(revision) > 2 and revision[2] not in ("main", COMMIT):
            return 404, {"X-Error-Code": "RevisionNotFound"}, b"{}"
        if self.gated:
            return 403, {"X-Error-Code": "GatedRepo"}, b"{}"
        if path.startswith(f"{info}/tree/"):
            return 200, {"Content-Type": "application/json"}, json.dumps(self._tree()).encode()
        if path.startswith(info):
            body: dict[str, Any] = {"id": self.repo, "sha": COMMIT, "siblings": self._siblings()}
            return 200, {"Content-Type": "application/json"}, json.dumps(body).encode()
        return self._file("/".join(revision[3:]))

    def _file(self, name: str) -> tuple[int, dict[str, str], bytes]:
        file = self.folder / name
        if not file.is_file():
            return 404, {"X-Error-Code": "EntryNotFound"}, b""
        body = file.read_bytes()
        return 200, {"ETag": f'"{hashlib.sha256(body).hexdigest()}"', "X-Repo-Commit": COMMIT}, body

    def _siblings(self) -> list[dict[str, str]]:
        return [{"rfilename": entry["path"]} for entry in self._tree()]

    def _tree(self) -> list[dict[str, Any]]:
        files = sorted(path for path in self.folder.rglob("*") if path.is_file())
        return [
            {
                "type": "file",
                "path": str(file.relative_to(self.folder)),
                "size": file.stat().st_size,
                "oid": hashlib.sha1(file.read_bytes(), usedforsecurity=False).hexdigest(),
            }
            for file in files
        ]


@contextlib.contextmanager
def serve_hub(hub: FakeHub) -> Iterator[FakeHub]:
    """Serve it as long as the block runs; ``endpoint`` is what HF_ENDPOINT has to be."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self._reply(with_body=True)

        def do_HEAD(self) -> None:
            self._reply(with_body=False)

        def _reply(self, *, with_body: bool) -> None:
            path = unquote(urlsplit(self.path).path)
            status, headers, body = hub.answer(path)
            if with_body and "/resolve/" in path:
                hub.asked.append(path.split("/resolve/")[1].split("/", 1)[1])
            self.send_response(status)
            for name, value in headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            if with_body:
                self.wfile.write(body)

        def log_message(self, *args: Any) -> None:
            """Nothing: the test's output is not this server's log."""

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    hub.endpoint = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield hub
    finally:
        server.shutdown()
        thread.join(10)
        server.server_close()
