"""Holds every answer of a served app against its own openapi.json: status, headers, content type, body, each event."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

import jsonschema_rs
from fastapi import FastAPI
from starlette.datastructures import Headers
from starlette.middleware import Middleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send


class Conformance:
    """Middleware outside of all others. `violations` and `seen` grow; seen: (operation, status, content type)."""

    def __init__(self, app: ASGIApp, owner: FastAPI, violations: list[str], seen: set[tuple[str, int, str]]) -> None:
        self.app = app
        self.owner = owner
        self.violations = violations
        self.seen = seen
        self.validators: dict[str, Any] = {}

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] == "HEAD":
            await self.app(scope, receive, send)
            return
        status, headers, body, complete = 0, Headers(), bytearray(), False

        async def watched(message: Message) -> None:
            nonlocal status, headers, complete
            if message["type"] == "http.response.start":
                status, headers = message["status"], Headers(raw=message["headers"])
            elif message["type"] == "http.response.body":
                body.extend(message.get("body", b""))
                complete = not message.get("more_body", False)
            await send(message)

        await self.app(scope, receive, watched)
        path = getattr(scope.get("route"), "path_format", "")
        operation = self.owner.openapi()["paths"].get(path, {}).get(scope["method"].lower())
        if operation is not None and status:
            name = f"{scope['method']} {path}"
            self.violations += [f"{name} {status}: {what}" for what in self._check(operation, status, headers, body)]
            self.seen.add((name, status, headers.get("content-type", "").partition(";")[0]))
            streamed = headers.get("content-type", "").startswith("text/event-stream")
            if streamed and complete and not body.endswith(b"data: [DONE]\n\n"):
                self.violations.append(f"{name}: a stream without its end")

    def _check(self, operation: Any, status: int, headers: Mapping[str, str], body: bytes | bytearray) -> Iterator[str]:
        declared = operation["responses"].get(str(status))
        if declared is None:
            yield "the status is not declared"
            return
        for name in declared.get("headers", {}):
            if name.lower() not in headers:
                yield f"no header {name}"
        kind = headers.get("content-type", "").partition(";")[0]
        content = declared.get("content", {}).get(kind)
        if content is None:
            yield f"the content type {kind} is not declared"
        elif kind == "application/json":
            yield from self._validate(content["schema"], bytes(body))
        elif kind == "text/event-stream":
            schema = content["itemSchema"]["properties"]["data"]["contentSchema"]
            for event in bytes(body).split(b"\n\n")[:-1]:
                if event != b"data: [DONE]":
                    yield from self._validate(schema, event.removeprefix(b"data: "))

    def _validate(self, schema: Any, text: bytes) -> Iterator[str]:
        key = json.dumps(schema)
        if key not in self.validators:
            whole = {**schema, "components": self.owner.openapi()["components"]}
            self.validators[key] = jsonschema_rs.Draft202012Validator(whole)
        for error in self.validators[key].iter_errors(json.loads(text)):
            yield f"{error.message} at {list(error.instance_path)} of {text[:300]!r}"


def watch(app: FastAPI) -> tuple[list[str], set[tuple[str, int, str]]]:
    """Put the check around an app that has not served yet; its violations and what it has seen."""
    violations: list[str] = []
    seen: set[tuple[str, int, str]] = set()
    app.user_middleware.insert(0, Middleware(Conformance, owner=app, violations=violations, seen=seen))
    return violations, seen
