"""Errors on the wire: every refusal is `{"error": {"message", "type", "param", "code"}}` with the error's status.

Maps dfastllm's error tree, FastAPI's validation errors and Starlette's HTTP errors to that one form. Decides nothing.
"""

from __future__ import annotations

import difflib
import math
import re
from collections.abc import Mapping, Sequence
from typing import Any

from fastapi import Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException

from dfastllm.errors import DFastLLMError, NotReadyError, RateLimitError, UnsupportedError, ValidationError
from dfastllm.server.schemas import ChatRequest, CompletionRequest

__all__ = ["error_body", "error_response", "http_refusal", "known_refusal", "validation_refusal"]

# Fields of the OpenAI API and of vLLM that exist but are not honoured here: they get a clearer sentence than a typo.
_KNOWN = frozenset(
    (
        *("audio", "best_of", "function_call", "functions", "guided_choice", "guided_grammar", "guided_json"),
        *("guided_regex", "length_penalty", "logits_processors", "prediction", "prompt_cache_key"),
        *("prompt_logprobs", "reasoning_effort", "structured_outputs", "truncate_prompt_tokens"),
        *("use_beam_search", "verbosity", "web_search_options"),
    )
)
_TAG = re.compile(r"(str|int|float|bool|none|(list|dict|constrained|nullable|function|literal|lax|json)\W.*|[A-Z]\w*)$")
_HTTP_CODES = {404: "not_found", 405: "method_not_allowed", 413: "payload_too_large"}


def _printable(text: str, limit: int = 2000) -> str:
    """Text that can be sent as UTF-8 (a request may name a field with a lone surrogate), cut to `limit`."""
    text = text.encode("utf-8", "backslashreplace").decode()
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _object(message: str, kind: str, param: str | None, code: str) -> dict[str, Any]:
    param = None if param is None else _printable(param, 200)
    return {"error": {"message": _printable(message), "type": kind, "param": param, "code": code}}


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
    """404 and 405 of the router, and FastAPI's 400 for a body that cannot even be parsed."""
    assert isinstance(error, HTTPException)
    message = {
        404: f"There is no {request.url.path}. GET /openapi.json lists what there is.",
        405: f"{request.url.path} does not take {request.method}.",
    }.get(error.status_code, str(error.detail))
    kind = "invalid_request_error" if error.status_code < 500 else "server_error"
    body = _object(message, kind, None, _HTTP_CODES.get(error.status_code, "invalid_request"))
    return JSONResponse(body, error.status_code, error.headers)


async def validation_refusal(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return error_response(_explain(error.errors(), request.headers.get("content-type", "")))


def _explain(problems: Sequence[Mapping[str, Any]], content_type: str) -> ValidationError:
    """One sentence for the first offending field, whatever number of union branches reported it."""
    first = problems[0]
    if first["type"] == "json_invalid":
        return ValidationError(f"The body is not valid JSON: {first['ctx']['error']} at character {first['loc'][-1]}.")
    if first["loc"] == ("body",):
        got = "" if first["type"] == "missing" else f" Got Content-Type {content_type or 'none'!r}."
        return ValidationError(f"The body must be a JSON object, sent with Content-Type: application/json.{got}")
    for problem in problems:
        if problem["type"] == "extra_forbidden":
            return _unknown(_path(problem["loc"][:-1]), str(problem["loc"][-1]))
    param = _path(first["loc"])
    if first["type"] == "missing":
        return ValidationError(f"{param} is required.", param=param)
    same = [p["msg"] for p in problems if _path(p["loc"]).startswith(param)]
    reasons = "; or ".join(dict.fromkeys(reason[:200] for reason in same))
    message = f"{param}: {reasons}. Got {type(first.get('input')).__name__}."
    why = _UNHONOURED.get(re.sub(r"\.\d+", "", param))
    return UnsupportedError(message, param=param, hint=why) if why else ValidationError(message, param=param)


_UNHONOURED = {
    "response_format.type": "Output is not constrained yet; ask for the form in the prompt.",
    "tool_choice": "A call cannot be guaranteed yet; use auto and say in the prompt that a tool must be used.",
    "tools.function.strict": "Arguments are not constrained yet.",
    "parallel_tool_calls": "The number of calls cannot be limited yet.",
    "store": "Nothing is stored.",
}


def _path(location: Sequence[Any]) -> str:
    """`("body", "messages", 0, "content", "str")` -> "messages.0.content": without pydantic's union tags."""
    steps: list[str] = []
    for step in location[1:]:
        if isinstance(step, str) and _TAG.match(step):
            break
        steps.append(str(step))
    return ".".join(steps)


def _unknown(where: str, name: str) -> UnsupportedError:
    param = f"{where}.{name}" if where else name
    shown = _printable(name, 80)
    if name in _KNOWN:
        return UnsupportedError(
            f"This server does not honour the field {shown!r}, so it does not take it.", param=param
        )
    near = (
        [] if where else difflib.get_close_matches(shown, {*ChatRequest.model_fields, *CompletionRequest.model_fields})
    )
    hint = f"Did you mean {near[0]!r}?" if near else "Remove it; GET /docs lists the fields."
    return UnsupportedError(f"Unknown field {shown!r}.", param=param, hint=hint)
