"""What happens to every request before a route sees it. Plain ASGI, so that streams and disconnects pass through.

`Head` answers HEAD as GET without the body. `Trace` gives each request its id, times it, and turns an unexpected
exception into a logged 500. `BodyLimit` reads the body (chunked or not) up to a limit. Who may ask is `access`'s part.
A WebSocket is a request until it is accepted or refused: it has no body, and its id and its time are looked at as any
other's.
"""

from __future__ import annotations

import logging
import re
import time
import uuid
from collections.abc import Callable

from starlette.datastructures import Headers, MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from dfastllm.errors import GenerationError, PayloadTooLargeError
from dfastllm.server.refusals import error_response

__all__ = ["BodyLimit", "Head", "Trace"]

log = logging.getLogger("dfastllm.server")
_SANE_ID = re.compile(r"[A-Za-z0-9._:-]{1,128}")
_ANSWERS = {"http.response.start": 0, "websocket.accept": 101, "websocket.http.response.start": 0}

Observe = Callable[[str, str, int, float], None]  # method, route template, status, seconds


class Head:
    """Outermost: what lies within sees GET. The answer keeps its headers, the length of the body that GET would give
    included (RFC 9110, 9.3.2)."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or scope["method"] != "HEAD":
            await self.app(scope, receive, send)
            return

        async def bare(message: Message) -> None:
            if message["type"] == "http.response.body":
                message = {**message, "body": b""}
            await send(message)

        await self.app({**scope, "method": "GET"}, receive, bare)


class Trace:
    """The client's X-Request-ID is kept when it is sane, else one is made; it is always in the answer.

    observe: told about each finished request (metrics).
    """

    def __init__(self, app: ASGIApp, observe: Observe) -> None:
        self.app = app
        self.observe = observe

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        given = Headers(scope=scope).get("x-request-id", "")
        request_id = given if _SANE_ID.fullmatch(given) else uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = request_id
        method = scope.get("method", "GET")  # a WebSocket is asked for by GET
        status = 0
        began = time.perf_counter()

        def observe() -> None:
            template = getattr(scope.get("route"), "path", "unmatched")
            self.observe(method, template, status or 499, time.perf_counter() - began)

        async def tagged(message: Message) -> None:
            nonlocal status
            if message["type"] in _ANSWERS:
                status = message.get("status", _ANSWERS[message["type"]])
                message.setdefault("headers", [])
                MutableHeaders(scope=message)["X-Request-ID"] = request_id
            elif message["type"] == "websocket.close" and not status:
                status = 403  # what a server makes of it
            await send(message)
            if message["type"] == "websocket.accept":
                observe()

        try:
            await self.app(scope, receive, tagged)
        except Exception:
            log.exception("request %s failed: %.20r %.200r", request_id, method, scope["path"])
            if status:
                raise  # too late for an answer: the server closes the connection
            failure = GenerationError(
                "The server failed on this request.", hint=f"Its log says why, under {request_id}."
            )
            await error_response(failure)(scope, receive, tagged)
        finally:
            if status != 101:
                observe()


class BodyLimit:
    """Reads the whole body before the route runs, and answers 413 as soon as it is longer than `limit` bytes."""

    def __init__(self, app: ASGIApp, limit: int) -> None:
        self.app = app
        self.limit = limit

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        declared = Headers(scope=scope).get("content-length", "0")
        if declared.isdigit() and int(declared) > self.limit:
            await self._refuse(declared, scope, receive, send)
            return
        body = bytearray()
        more = True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return  # nobody to answer
            body += message.get("body", b"")
            more = message.get("more_body", False)
            if len(body) > self.limit:
                await self._refuse("more", scope, receive, send)
                return
        whole: list[Message] = [{"type": "http.request", "body": bytes(body), "more_body": False}]

        async def replay() -> Message:
            return whole.pop() if whole else await receive()

        await self.app(scope, replay, send)

    async def _refuse(self, got: str, scope: Scope, receive: Receive, send: Send) -> None:
        error = PayloadTooLargeError(f"The body must have at most {self.limit} bytes, got {got}.")
        response = error_response(error)
        response.headers["Connection"] = "close"  # the rest of the body is not read
        await response(scope, receive, send)
