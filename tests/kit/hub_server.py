"""A small Hugging Face hub on loopback: what a client needs to fetch models, in the shapes of the real one.

GET  /api/models/ORG/NAME/revision/REVISION   {id, sha, siblings: [{rfilename, size}]}
HEAD, GET /ORG/NAME/resolve/REVISION/FILE     the file, with ETag, X-Repo-Commit and ranges
"""

from __future__ import annotations

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

__all__ = ["Hub", "Repository"]


@dataclass
class Repository:
    """files: name -> content, at the newest commit of each branch. gated: wants its conditions accepted. private:
    wants this token."""

    files: dict[str, bytes]
    branches: dict[str, str] = field(default_factory=lambda: {"main": "a" * 40})
    gated: bool = False
    private: str = ""


class Hub:
    """repositories by ORG/NAME. asked: each request as (method, path, Range). cut: name of a file -> after how many
    bytes its next answer is cut off."""

    def __init__(self) -> None:
        self.repositories: dict[str, Repository] = {}
        self.asked: list[tuple[str, str, str]] = []
        self.cut: dict[str, int] = {}
        self.url = ""

    def fetched(self) -> list[str]:
        """Names of the files whose content was asked for, in order."""
        return [path.split("/", 5)[5] for method, path, _ in self.asked if method == "GET" and "/resolve/" in path]

    @contextmanager
    def serve(self) -> Iterator[Hub]:
        hub = self

        class Answer(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *_: object) -> None:
                pass

            def do_HEAD(self) -> None:
                hub.answer(self)

            def do_GET(self) -> None:
                hub.answer(self)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Answer)
        thread = threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        self.url = f"http://127.0.0.1:{server.server_address[1]}"
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()
            thread.join()

    def answer(self, to: BaseHTTPRequestHandler) -> None:
        path = to.path.partition("?")[0]
        self.asked.append((to.command, path, to.headers.get("Range", "")))
        parts = path.strip("/").split("/")
        if parts[:2] == ["api", "models"] and parts[4:5] == ["revision"]:
            self._about(to, "/".join(parts[2:4]), "/".join(parts[5:]).replace("%2F", "/"))
        elif parts[2:3] == ["resolve"]:
            self._file(to, "/".join(parts[:2]), parts[3].replace("%2F", "/"), "/".join(parts[4:]))
        else:
            self._refuse(to, 404, "")

    def _repository(self, to: BaseHTTPRequestHandler, name: str) -> Repository | None:
        found = self.repositories.get(name)
        token = to.headers.get("Authorization", "").removeprefix("Bearer ")
        if found is None or (found.private and token != found.private):
            self._refuse(to, 404 if token else 401, "RepoNotFound")
            return None
        return found

    def _about(self, to: BaseHTTPRequestHandler, name: str, revision: str) -> None:
        found = self._repository(to, name)
        if found is None:
            return
        if revision not in (*found.branches, *found.branches.values()):
            self._refuse(to, 404, "RevisionNotFound")
            return
        files = [{"rfilename": file, "size": len(data), "blobId": _etag(data)} for file, data in found.files.items()]
        sha = found.branches.get(revision, revision)
        body = {"_id": "0", "id": name, "modelId": name, "sha": sha, "private": False, "tags": [], "siblings": files}
        self._send(to, 200, json.dumps(body).encode(), {"Content-Type": "application/json"})

    def _file(self, to: BaseHTTPRequestHandler, name: str, revision: str, file: str) -> None:
        found = self._repository(to, name)
        if found is None:
            return
        if found.gated:
            self._refuse(to, 403, "GatedRepo")
            return
        if file not in found.files:
            self._refuse(to, 404, "EntryNotFound")
            return
        data = found.files[file]
        headers = {
            "ETag": f'"{_etag(data)}"',
            "X-Repo-Commit": found.branches.get(revision, revision),
            "Accept-Ranges": "bytes",
        }
        status, start = 200, 0
        if span := to.headers.get("Range"):
            status, start = 206, int(span.removeprefix("bytes=").split("-")[0])
            headers["Content-Range"] = f"bytes {start}-{len(data) - 1}/{len(data)}"
        self._send(to, status, data[start:], headers, self.cut.pop(file, None) if to.command == "GET" else None)

    def _send(
        self, to: BaseHTTPRequestHandler, status: int, body: bytes, headers: dict[str, str], cut: int | None = None
    ) -> None:
        to.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body))}.items():
            to.send_header(key, value)
        to.end_headers()
        if to.command == "GET":
            to.wfile.write(body if cut is None else body[:cut])
        if cut is not None:
            to.wfile.flush()
            to.connection.close()
            to.close_connection = True

    def _refuse(self, to: BaseHTTPRequestHandler, status: int, code: str) -> None:
        self._send(to, status, b"", {"X-Error-Code": code, "X-Error-Message": f"said {code}"})


def _etag(data: bytes) -> str:
    return hashlib.sha1(data).hexdigest()
