"""The OpenAPI description, made true: the statuses, headers, content types and keys that FastAPI cannot know.

The routes declare their bodies and replies; here is what all of them share. Every answer carries X-Request-ID; a
refusal is an `ErrorBody`; a stream's events are declared with its answer, as FastAPI declares its own streams.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from fastapi.openapi.utils import get_openapi
from pydantic.json_schema import models_json_schema

from dfastllm.server.access import scope_of
from dfastllm.server.body import Body
from dfastllm.server.replies import ErrorBody, Out

__all__ = ["REFUSALS", "description", "responses", "stream"]

REFUSALS: Mapping[int, str] = {
    400: "The request cannot be honoured; `param` names the field.",
    401: "No API key, or a wrong one.",
    403: "This key may not do that.",
    404: "There is no such model, or no such request.",
    413: "The body is longer than the server takes.",
    429: "Too much at once: come back after Retry-After.",
    499: "The request was cancelled.",
    500: "The server failed on this request.",
    503: "Still loading, or shutting down.",
    504: "The request ran past its time limit.",
}
_REF = "#/components/schemas/{model}"
_TEXT = {"type": "string"}
_HEADERS: Mapping[str, Mapping[str, Any]] = {
    "Retry-After": {"description": "Seconds.", "schema": {"type": "integer", "minimum": 0}},
    "WWW-Authenticate": {"schema": _TEXT},
    "X-Request-ID": {"description": "The client's own, or a new one.", "schema": _TEXT},
}
_ALSO = {401: "WWW-Authenticate", 429: "Retry-After", 503: "Retry-After"}


def responses(reply: type[Out] | None, refusals: tuple[int, ...], **more: Any) -> dict[int | str, dict[str, Any]]:
    """What a route may answer: 200 with `reply` (and what `more` says of it), and its refusals."""
    good: dict[str, Any] = {"description": "The answer.", **({} if reply is None else {"model": reply}), **more}
    declared: dict[int | str, dict[str, Any]] = {200: good}
    for status in refusals:
        declared[status] = {"model": ErrorBody, "description": REFUSALS[status]}
    return declared


def stream(*chunks: type[Out]) -> dict[str, Any]:
    """The content of a 200 that may be a stream of such chunks."""
    models: tuple[type[Out], ...] = (*chunks, ErrorBody)
    data = {"anyOf": [{"$ref": _REF.format(model=model.__name__)} for model in models]}
    item = {"data": {**_TEXT, "contentMediaType": "application/json", "contentSchema": data}}
    return {
        "text/event-stream": {
            "itemSchema": {
                "type": "object",
                "description": "With stream: true. Events of a data line each; the last one is [DONE].",
                "properties": item,
                "required": ["data"],
            }
        }
    }


def description(
    info: Mapping[str, Any],
    routes: list[Any],
    events: tuple[type[Out], ...],
    frames: tuple[type[Body], ...],
    keyed: bool,
    tenants: bool = False,
) -> Any:
    """The document. events: types of stream events and of what a WebSocket sends. frames: what it takes. keyed: the
    server asks for an API key; tenants: for one of its database, which may have too few scopes, or not be answered
    for."""
    api = get_openapi(**info, routes=routes)
    received: list[Any] = [(model, "validation") for model in frames]
    _, defined = models_json_schema([*((model, "serialization") for model in events), *received], ref_template=_REF)
    components = api["components"]["schemas"]
    for name, schema in defined["$defs"].items():
        same = components.get(name, schema)
        assert same.get("properties", {}).keys() == schema.get("properties", {}).keys(), f"two types are called {name}"
    components |= defined["$defs"]
    for name in ("HTTPValidationError", "ValidationError"):  # FastAPI's own; a refusal here is an ErrorBody
        components.pop(name, None)
    for path, operations in api["paths"].items():
        for operation in operations.values():
            operation["responses"].pop("422", None)
            if keyed and scope_of(path, tenants=tenants) is not None:
                operation["security"] = [{"key": []}]
                refused = {"schema": {"$ref": _REF.format(model=ErrorBody.__name__)}}
                for status in (401, 403, 429, 503) if tenants else (401,):
                    answer = {"description": REFUSALS[status], "content": {"application/json": refused}}
                    operation["responses"].setdefault(str(status), answer)
            for status, answer in operation["responses"].items():
                names = ["X-Request-ID", *filter(None, [_ALSO.get(int(status))])]
                answer["headers"] = {name: {"required": True, **_HEADERS[name]} for name in names}
    if keyed:
        api["components"]["securitySchemes"] = {"key": {"type": "http", "scheme": "bearer"}}
    return api
