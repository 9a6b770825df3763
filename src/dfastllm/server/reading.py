"""How the body of a request is read: counted, parsed and validated, off the event loop unless it is short.

FastAPI would parse and validate it on the event loop, all of it, and list every wrong item. It still learns from an
endpoint's annotation which body there is and describes it in openapi.json; reading it is done here.
"""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any, TypeVar, cast

import pydantic
from fastapi import Request
from fastapi.responses import Response
from fastapi.routing import APIRoute

from dfastllm.server.body import Body
from dfastllm.server.bounds import read_json
from dfastllm.server.jobs import while_connected
from dfastllm.server.readers import SHORT
from dfastllm.server.refusals import no_body, refused_body
from dfastllm.server.serving import Serving
from dfastllm.server.yaml_text import read_yaml

__all__ = ["Route", "read_body", "validated"]

B = TypeVar("B", bound=Body)


class Route(APIRoute):
    """An endpoint (body, request, parts of the path) whose body is read by `read_body`, or one without a body."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        if self.body_field is None:
            return super().get_route_handler()
        kind = cast("type[Body]", self.body_field.field_info.annotation)
        endpoint = self.endpoint

        async def handler(request: Request) -> Response:
            serving: Serving = request.app.state.serving
            data = await request.body()
            content_type = request.headers.get("content-type", "")
            if len(data) <= SHORT:
                body = read_body(kind, data, content_type, serving.settings.max_body_values)
            else:
                reading = serving.readers.run(
                    len(data), read_body, kind, data, content_type, serving.settings.max_body_values
                )
                body = await while_connected(request, reading)
            response: Response = await endpoint(body, request, **request.path_params)
            return response

        return handler


def read_body(kind: type[B], data: bytes, content_type: str, values: int) -> B:
    """The body as `kind`. Raises PayloadTooLargeError, or ValidationError naming the field."""
    if data and kind.yaml and _is_yaml(content_type):
        return validated(kind, read_yaml(data))
    if not data or not _is_json(content_type):
        raise no_body(content_type if data else None)
    return validated(kind, read_json(data, values))


def validated(kind: type[B], given: Any) -> B:
    """A value of JSON as `kind`. Raises ValidationError naming the field."""
    try:
        return kind.model_validate(given)
    except pydantic.ValidationError as error:
        problems = error.errors(include_url=False)
    raise refused_body(problems)  # outside: what it names may be large, and an error keeps the one it stands in for


def _is_yaml(content_type: str) -> bool:
    return content_type.partition(";")[0].strip().lower() in ("application/yaml", "application/x-yaml", "text/yaml")


def _is_json(content_type: str) -> bool:
    kind = content_type.partition(";")[0].strip().lower()
    return kind == "application/json" or (kind.startswith("application/") and kind.endswith("+json"))
