"""From the server's JSON to results: whole answers and chunks of HTTP, frames of the WebSocket. No I/O."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from .errors import ClientError, ProtocolError, ServerError, of_response
from .results import (
    FunctionMetadata,
    GenerationResult,
    HealthStatus,
    ParamMetadata,
    PipelineEvent,
    PipelineResult,
    RuntimeMetadata,
    TokenData,
)

__all__ = ["AnswerReader", "PipelineReader", "health", "metadata", "of_answer", "openapi_metadata"]

_STATUS_IN_STREAM = {
    "cancelled": 499,
    "not_ready": 503,
    "timeout": 504,
    "authentication_error": 401,
    "invalid_request_error": 400,
    "rate_limit_error": 429,
}


def _error_in_stream(event: Mapping[str, Any], request_id: str) -> ClientError:
    """An error after the answer began: its status follows from its code, or from its type."""
    error = event["error"] if isinstance(event["error"], dict) else {}
    status = _STATUS_IN_STREAM.get(error.get("code", "")) or _STATUS_IN_STREAM.get(error.get("type", ""), 500)
    return of_response(status, event, {}, request_id)


def of_answer(body: Mapping[str, Any], request_id: str) -> GenerationResult:
    """A whole answer of /v1/completions or /v1/chat/completions."""
    try:
        choice = body["choices"][0]
        message = choice.get("message", {})
        text = choice["text"] if "text" in choice else message.get("content") or ""
        return _result(body, body, text, choice["finish_reason"], message.get("tool_calls") or (), request_id)
    except (KeyError, IndexError, TypeError) as error:
        raise ProtocolError(f"An answer without {error}: {str(body)[:200]}", request_id=request_id) from error


def _result(
    body: Mapping[str, Any],
    took: Mapping[str, Any],
    text: str,
    finish_reason: str | None,
    tool_calls: Sequence[Mapping[str, Any]],
    request_id: str,
) -> GenerationResult:
    """took: holds usage and figures."""
    return GenerationResult(
        text=text,
        tokens_generated=took["usage"]["completion_tokens"],
        prompt_tokens=took["usage"]["prompt_tokens"],
        time_ms=1000.0 * took["dfastllm"]["total_seconds"],
        finish_reason=finish_reason,
        model=body["model"],
        request_id=request_id,
        cost_usd=took["usage"].get("cost_usd"),
        tool_calls=tuple(tool_calls),
        raw=body,
    )


class AnswerReader:
    """Chunks of an HTTP stream, or frames of a WebSocket one, to TokenData and at the end a GenerationResult."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id
        self._text: list[str] = []
        self._tokens = 0
        self._calls: dict[int, dict[str, Any]] = {}
        self._finish: str | None = None
        self._took: dict[str, Any] = {}
        self._last: Mapping[str, Any] = {}

    def chunk(self, chunk: Mapping[str, Any]) -> TokenData | None:
        """One chunk of HTTP; None where it says only what the result will. Raises ClientError for an error in it."""
        if "error" in chunk:
            raise _error_in_stream(chunk, self.request_id)
        self._took |= {name: chunk[name] for name in ("usage", "dfastllm") if chunk.get(name) is not None}
        self._last = chunk if chunk.get("choices") else self._last or chunk
        if canvas := chunk.get("canvas"):
            return self._piece(canvas=tuple(canvas["events"]))
        if not chunk.get("choices"):
            return None
        choice = chunk["choices"][0]
        delta = choice.get("delta", {})
        ids = tuple(choice.get("token_ids") or ())
        if "role" in delta and not (delta.get("content") or ids or choice.get("finish_reason")):
            return None  # it only says that the assistant speaks
        return self._piece(
            text=choice["text"] if "text" in choice else delta.get("content") or "",
            tokens=len(ids),
            token_ids=ids,
            finish_reason=choice.get("finish_reason"),
            logprob=_logprob(choice.get("logprobs")),
            tool_calls=tuple(delta.get("tool_calls") or ()),
        )

    def frame(self, data: Mapping[str, Any]) -> TokenData:
        """The data of a `streaming` frame."""
        if data.get("type") == "canvas":
            return self._piece(canvas=tuple(data["events"]))
        if data.get("type") != "token":
            raise ProtocolError(f"A stream's frame of type {data.get('type')!r}; this client knows token and canvas.")
        return self._piece(
            text=data["text"],
            tokens=data["tokens"],
            token_ids=tuple(data.get("token_ids") or ()),
            finish_reason=data.get("finish_reason") if data["is_final"] else None,
            logprob=data.get("logprob"),
            tool_calls=tuple(data.get("tool_calls") or ()),
        )

    def ended(self) -> GenerationResult:
        """The result of an HTTP stream that ended as it should. Raises ServerError for one that did not say how."""
        if self._finish is None or not {"usage", "dfastllm"} <= set(self._took):
            raise ServerError("The stream ended before its answer did.", request_id=self.request_id)
        return _result(self._last, self._took, "".join(self._text), self._finish, self._whole_calls(), self.request_id)

    def complete(self, data: Mapping[str, Any]) -> GenerationResult:
        """The result of a `complete` frame."""
        choices = data.get("choices") or [{}]
        calls = choices[0].get("message", {}).get("tool_calls") or self._whole_calls()
        return GenerationResult(
            text=data["text"],
            tokens_generated=data["tokens_generated"],
            prompt_tokens=data["prompt_tokens"],
            time_ms=data["time_ms"],
            finish_reason=data["finish_reason"],
            model=data["model"],
            request_id=self.request_id,
            cost_usd=data.get("cost_usd"),
            tool_calls=tuple(calls),
            raw=data,
        )

    def _piece(
        self,
        text: str = "",
        tokens: int = 0,
        finish_reason: str | None = None,
        tool_calls: Sequence[Mapping[str, Any]] = (),
        **more: Any,
    ) -> TokenData:
        index = self._tokens
        self._tokens += tokens
        self._text.append(text)
        self._finish = finish_reason or self._finish
        for call in tool_calls:
            self._call(call)
        final = finish_reason is not None
        return TokenData(
            text=text,
            token=text,
            index=index,
            tokens=tokens,
            is_final=final,
            finish_reason=finish_reason,
            tool_calls=tool_calls,
            **more,
        )

    def _call(self, piece: Mapping[str, Any]) -> None:
        """A call's beginning, or more of its arguments."""
        known = self._calls.get(piece["index"])
        if known is None:
            begun = {name: value for name, value in piece.items() if name != "index"}
            self._calls[piece["index"]] = {**begun, "function": dict(piece["function"])}
        else:
            known["function"]["arguments"] += piece["function"].get("arguments") or ""

    def _whole_calls(self) -> list[Mapping[str, Any]]:
        return [self._calls[index] for index in sorted(self._calls)]


def _logprob(logprobs: Any) -> float | None:
    """Of a chunk with one token: of completions, or of chats."""
    if not isinstance(logprobs, dict):
        return None
    values = logprobs.get("token_logprobs") or [entry["logprob"] for entry in logprobs.get("content") or ()]
    return values[0] if len(values) == 1 else None


def health(data: Mapping[str, Any], version: str | None = None) -> HealthStatus:
    return HealthStatus(
        status=data["status"],
        version=data.get("version", version),
        uptime_seconds=data.get("uptime_seconds"),
        models=tuple(data.get("models") or ()),
    )


def metadata(data: Mapping[str, Any]) -> RuntimeMetadata:
    """Of a `metadata` frame."""
    functions = tuple(
        FunctionMetadata(
            name=one["name"],
            description=one.get("description", ""),
            params=tuple(
                ParamMetadata(
                    param["name"],
                    param["type"],
                    param.get("description", ""),
                    bool(param.get("required")),
                    param.get("default"),
                )
                for param in one.get("params", ())
            ),
            returns=one.get("returns"),
            streaming=bool(one.get("streaming")),
        )
        for one in data["functions"]
    )
    return RuntimeMetadata(data["version"], functions)


def openapi_metadata(api: Mapping[str, Any]) -> RuntimeMetadata:
    """The operations of an openapi.json, as functions."""
    schemas = api.get("components", {}).get("schemas", {})
    functions = tuple(
        FunctionMetadata(
            name=f"{method.upper()} {path}",
            description=operation.get("description") or operation.get("summary", ""),
            params=tuple(_params(operation, schemas)),
            returns=_content(operation.get("responses", {}).get("200", {})).get("$ref", "").rpartition("/")[2] or None,
            streaming="text/event-stream" in operation.get("responses", {}).get("200", {}).get("content", {}),
        )
        for path, operations in api["paths"].items()
        for method, operation in operations.items()
    )
    return RuntimeMetadata(api["info"]["version"], functions)


def _content(body: Mapping[str, Any]) -> Mapping[str, Any]:
    schema: Mapping[str, Any] = body.get("content", {}).get("application/json", {}).get("schema", {})
    return schema


def _params(operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> Iterator[ParamMetadata]:
    for param in operation.get("parameters", ()):
        kind = _type(param.get("schema", {}))
        yield ParamMetadata(param["name"], kind, param.get("description", ""), bool(param.get("required")))
    schema = schemas.get(_content(operation.get("requestBody", {})).get("$ref", "").rpartition("/")[2], {})
    for name, field in schema.get("properties", {}).items():
        required = name in schema.get("required", ())
        yield ParamMetadata(name, _type(field), field.get("description", ""), required, field.get("default"))


def _type(schema: Mapping[str, Any]) -> str:
    if parts := schema.get("anyOf"):
        return " | ".join(dict.fromkeys(_type(part) for part in parts))
    return str(schema.get("type") or schema.get("$ref", "any").rpartition("/")[2])


class PipelineReader:
    """Events of a pipeline's run, and at its end the result."""

    def __init__(self, request_id: str) -> None:
        self.request_id = request_id

    def event(self, data: Mapping[str, Any]) -> PipelineEvent:
        """One event. Raises ClientError for an error in it."""
        if isinstance(data.get("error"), dict):
            raise _error_in_stream(data, self.request_id)
        return PipelineEvent(type=data["type"], step=data["step"], text=data.get("text") or "", data=data)

    def ended(self, data: Mapping[str, Any]) -> PipelineResult:
        """data: of the event `done`, or of a `complete` frame."""
        return PipelineResult(
            output=data["output"],
            steps=tuple(data["steps"]),
            tokens_generated=data["usage"]["completion_tokens"],
            prompt_tokens=data["usage"]["prompt_tokens"],
            time_ms=data["time_ms"],
            request_id=self.request_id,
            raw=data,
        )
