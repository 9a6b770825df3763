"""Errors on the wire: every refusal is `{"error": {"message", "type", "param", "code"}}` with the error's status.

Maps dfastllm's error tree, pydantic's validation errors and Starlette's HTTP errors to that one form. Decides nothing.
"""

from __future__ import annotations

import difflib
import json
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from starlette.routing import Match
from starlette.types import Receive, Scope, Send

from dfastllm.errors import DFastLLMError, NotReadyError, RateLimitError, UnsupportedError, ValidationError
from dfastllm.server.body import MISSING, printable

__all__ = [
    "error_body",
    "error_response",
    "http_refusal",
    "known_refusal",
    "no_body",
    "no_socket",
    "parameter_refusal",
    "refused_body",
]

_TAG = re.compile(r"(str|int|float|bool|none|(list|dict|constrained|nullable|function|literal|lax|json)\W.*|[A-Z]\w*)$")
_QUOTED = re.compile(r"'([^']*)'")
_INDEX = re.compile(r"\.\d+")
_OF_BODIES = ("unknown_field", "wrong_kind", "missing_feature", "conflict", "too_many")  # what `body`, `bounds` raise
_NOT_FOUND = ("invalid_request_error", None, "not_found")  # type, param, code
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


def _object(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    param = None if param is None else printable(param, 200)
    return {"error": {"message": printable(message), "type": kind, "param": param, "code": code}}


def error_body(error: DFastLLMError) -> dict[str, Any]:
    """The OpenAI error object of an error of our tree."""
    return _object(error.message, error.type, error.param, error.code)


def error_response(error: DFastLLMError) -> JSONResponse:
    headers = {}
    if isinstance(error, RateLimitError):
        headers["Retry-After"] = str(max(1, math.ceil(error.retry_after)))
    elif isinstance(error, NotReadyError):
        headers["Retry-After"] = "1"
    elif error.status == 401:
        headers["WWW-Authenticate"] = "Bearer"
    return JSONResponse(error_body(error), error.status, headers)


async def known_refusal(_: Request, error: Exception) -> Response:
    assert isinstance(error, DFastLLMError)
    return error_response(error)


async def http_refusal(request: Request, error: Exception) -> Response:
    """404 and 405 of the router."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"There is no {request.url.path}. GET /openapi.json lists what there is.",
        405: f"{request.url.path} does not take {request.method}.",
    }.get(error.status_code, str(error.detail))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = _object(message, kind, None, _HTTP_CODES.get(error.status_code, "invalid_request"))
    headers = {"Allow": _allowed(request)} if error.status_code == 405 else error.headers
    return JSONResponse(body, error.status_code, headers)


async def no_socket(scope: Scope, receive: Receive, send: Send) -> None:
    """What no route matched. An upgrade to WebSocket gets 404 as any request does, not the bare 403 that closing before
    the handshake would be."""
    if scope["type"] != "websocket":
        raise HTTPException(404)
    await receive()  # websocket.connect
    body = _object(f"There is no WebSocket at {scope['path']}; there is one at /ws.", *_NOT_FOUND)
    await JSONResponse(body, 404)(scope, receive, send)


def _allowed(request: Request) -> str:
    """Every method of the path: the router names those of the first of its routes alone."""
    there = [route for route in request.app.routes if route.matches(request.scope)[0] is not Match.NONE]
    return ", ".join(sorted({method for route in there for method in route.methods}))


async def parameter_refusal(_: Request, error: Exception) -> Response:
    """What FastAPI found wrong with the query."""
    assert isinstance(error, RequestValidationError)
    problems = [{**problem, "loc": problem["loc"][1:]} for problem in error.errors()]
    return error_response(refused_body(problems))


def no_body(content_type: str | None) -> ValidationError:
    """For a request whose body is none, or is of another content type; None: there is not a byte of it."""
    if content_type is None:
        return ValidationError("The body must be a JSON object, got nothing.")
    got = f" Got Content-Type {content_type or 'none'!r:.200}."
    return ValidationError(f"The body must be a JSON object, sent with Content-Type: application/json.{got}")


def refused_body(problems: Sequence[Mapping[str, Any]]) -> ValidationError:
    """One sentence for the first offending field, whatever number of union branches reported it."""
    first = problems[0]
    for problem in problems:
        if problem["type"] in _OF_BODIES:
            return _refused(problem)
    if not first["loc"]:
        return ValidationError(f"The body must be a JSON object, got {_shown(first['input'])}.")
    param = _path(first["loc"])
    if first["type"] == "missing":
        return ValidationError(f"{param} is required.", param=param)
    path, value = _INDEX.sub("", param), first.get("input")
    if why := MISSING.get(path) or MISSING.get(f"{path}={value}" if isinstance(value, bool) else ""):
        return _not_done(param, value, why)
    same = [p for p in problems if _path(p["loc"]).startswith(param)]
    reasons = "; or ".join(dict.fromkeys(p["msg"][:200] for p in same))
    choices = [choice for p in same if p["type"] == "literal_error" for choice in _QUOTED.findall(p["ctx"]["expected"])]
    near = difflib.get_close_matches(value, choices, n=1) if isinstance(value, str) and len(value) < 80 else ()
    hint = f"Did you mean {near[0]!r}?" if near else None
    return ValidationError(f"{param}: {reasons}. Got {_shown(value)}.", param=param, hint=hint)


def _shown(value: Any) -> str:
    """A value of JSON for a message: itself where it is short, else what it is."""
    if isinstance(value, str):
        return repr(value if len(value) <= 80 else value[:79] + "…")
    if value is None or isinstance(value, bool | int | float):
        return f"{json.dumps(value):.80}"
    return "a list" if isinstance(value, list) else "an object"


def _refused(problem: Mapping[str, Any]) -> ValidationError:
    """The sentence of an error that `body` raised: it lies at an object and names one of its fields."""
    details = problem["ctx"]
    if problem["type"] == "too_many":
        param = _path(problem["loc"])
        return ValidationError(f"{param} has {details['got']:,} items; {details['most']:,} are taken.", param=param)
    where, name = _path(problem["loc"]), details["field"]
    param = f"{where}.{name}" if where else name
    path = _INDEX.sub("", param)
    if problem["type"] == "missing_feature":
        given = problem["input"]
        return _not_done(param, given.get(name) if isinstance(given, dict) else getattr(given, name), MISSING[path])
    if problem["type"] == "conflict":
        return ValidationError(details["why"], param=param)
    if problem["type"] == "wrong_kind":
        got = details["got"]
        if why := MISSING.get(f"{path}={got}"):
            return _not_done(param, got, why)
        return ValidationError(f"{param} must be {details['wanted']!r}, got {got!r}.", param=param)
    if why := MISSING.get(path):
        return _not_done(param, None, why)
    hint = f"Did you mean {details['near']!r}?" if details["near"] else "Remove it; GET /docs lists the fields."
    return UnsupportedError(f"Unknown field {name!r}.", param=param, hint=hint)


def _not_done(param: str, value: Any, why: str) -> UnsupportedError:
    shown = f"={value!r}" if isinstance(value, bool | int | float | str) else ""
    return UnsupportedError(f"{param}{shown[:80]} is not honoured: {why}", param=param)


def _path(location: Sequence[Any]) -> str:
    """`("messages", 0, "content", "str")` -> "messages.0.content": without pydantic's union tags."""
    return ".".join(str(step) for step in location if not (isinstance(step, str) and _TAG.match(step)))
