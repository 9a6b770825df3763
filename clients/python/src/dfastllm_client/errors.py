"""Every error of this client, typed, and how a refusal of the server becomes one.

    ClientError
    ├── InvalidRequestError    400, 413, 422 and the like: the call cannot be honoured as it is
    ├── AuthenticationError    401: the key is missing, wrong, disabled or expired
    ├── PermissionDeniedError  403: the key may not do this
    ├── NotFoundError          404: no such model, adapter, pipeline or request
    ├── RateLimitError         429: carries retry_after
    ├── CancelledError         499: the call was cancelled
    ├── ServerError            500 and above
    │   └── NotReadyError      503: loading or stopping; carries retry_after
    ├── TimeoutError           504, or the client's own time limit
    ├── ConnectionFailedError  no connection: the call was never sent, nothing was billed
    ├── ConnectionLostError    the connection broke after the call was sent: `received` says what had come
    └── ProtocolError          the server said what this client does not understand

A call that was sent and broke is never sent a second time: the server may have run and billed it. `received` of the
error holds the text and the number of tokens that had arrived.
"""

from __future__ import annotations

import builtins
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .record import Record

__all__ = [
    "AuthenticationError",
    "CancelledError",
    "ClientError",
    "ConnectionFailedError",
    "ConnectionLostError",
    "ErrorInfo",
    "InvalidRequestError",
    "NotFoundError",
    "NotReadyError",
    "PermissionDeniedError",
    "ProtocolError",
    "RateLimitError",
    "Received",
    "ServerError",
    "TimeoutError",
    "of_frame",
    "of_response",
]


@dataclass(frozen=True)
class ErrorInfo(Record):
    """An error as the WebSocket protocol has it. `retry_after` is in seconds."""

    code: str
    message: str
    details: Mapping[str, Any] | None = None
    retry_after: float | None = None


@dataclass(frozen=True)
class Received(Record):
    """What of an answer had arrived when its call failed: enough to go on from there by hand.

    text: as far as it came.
    tokens: how many of them.
    request_id: what the server knows the call by.
    """

    text: str = ""
    tokens: int = 0
    request_id: str | None = None


class ClientError(Exception):
    """Root of the tree.

    code: the server's word for it, stable, for programs ("model_not_found"); one of ours where the server said nothing.
    status: the HTTP status, also over a WebSocket where the server names it; None when there was no answer.
    param: the field of the call that is at fault, or None.
    retry_after: after how many seconds the same call may be sent again; None: it is not known, or never.
    details: more of what the server said.
    request_id: what the server knows the call by.
    received: what of the answer had come before.
    """

    code = "error"

    def __init__(
        self,
        message: str,
        *,
        code: str | None = None,
        status: int | None = None,
        param: str | None = None,
        retry_after: float | None = None,
        details: Mapping[str, Any] | None = None,
        request_id: str | None = None,
        received: Received | None = None,
    ) -> None:
        super().__init__(message)
        self.message = message
        self.code = code or type(self).code
        self.status = status
        self.param = param
        self.retry_after = retry_after
        self.details = details
        self.request_id = request_id
        self.received = received or Received(request_id=request_id)

    @property
    def info(self) -> ErrorInfo:
        return ErrorInfo(self.code, self.message, self.details, self.retry_after)


class InvalidRequestError(ClientError, ValueError):
    code = "invalid_request"


class AuthenticationError(ClientError):
    code = "invalid_api_key"


class PermissionDeniedError(ClientError):
    code = "permission_denied"


class NotFoundError(ClientError, LookupError):
    code = "not_found"


class RateLimitError(ClientError):
    code = "rate_limit_exceeded"


class CancelledError(ClientError):
    code = "cancelled"


class ServerError(ClientError):
    code = "internal_error"


class NotReadyError(ServerError):
    code = "not_ready"


class TimeoutError(ClientError, builtins.TimeoutError):
    code = "timeout"


class ConnectionFailedError(ClientError, ConnectionError):
    code = "connection_failed"


class ConnectionLostError(ClientError, ConnectionError):
    code = "connection_lost"


class ProtocolError(ClientError):
    code = "protocol_error"


_BY_STATUS: dict[int, type[ClientError]] = {
    401: AuthenticationError,
    403: PermissionDeniedError,
    404: NotFoundError,
    429: RateLimitError,
    499: CancelledError,
    503: NotReadyError,
    504: TimeoutError,
}
_STATUS_OF_CODE = {
    "UNAUTHORIZED": 401,
    "RATE_LIMIT_EXCEEDED": 429,
    "INVALID_PARAMS": 400,
    "DISPATCH_ERROR": 404,
    "INTERNAL_ERROR": 500,
}


def _class_of(status: int) -> type[ClientError]:
    return _BY_STATUS.get(status) or (ServerError if status >= 500 else InvalidRequestError)


def _seconds(value: Any) -> float | None:
    try:
        return max(0.0, float(value))
    except (TypeError, ValueError):
        return None


def of_response(status: int, body: Any, headers: Mapping[str, str], request_id: str | None = None) -> ClientError:
    """The error of an HTTP answer, `{"error": {message, type, param, code}}`; what is no such body is shown as it is.
    headers: of the answer, their names in lower case. request_id: our own, where the answer does not name one."""
    error = body.get("error") if isinstance(body, dict) else None
    error = error if isinstance(error, dict) else {"message": f"HTTP {status}: {str(body)[:200]}"}
    return _class_of(status)(
        str(error.get("message")),
        code=error.get("code"),
        status=status,
        param=error.get("param"),
        retry_after=_seconds(headers.get("retry-after")),
        details=error,
        request_id=headers.get("x-request-id", request_id),
    )


def of_frame(error: Mapping[str, Any], request_id: str | None) -> ClientError:
    """The error of a WebSocket frame, {code, message, details?, retry_after?}. Its details name the HTTP status and the
    finer code where the server has them."""
    details = error.get("details")
    details = details if isinstance(details, dict) else {}
    code = str(error.get("code", "INTERNAL_ERROR"))
    status = details.get("status")
    status = status if isinstance(status, int) else _STATUS_OF_CODE.get(code, 500)
    return _class_of(status)(
        str(error.get("message", code)),
        code=str(details.get("code", code)),
        status=status,
        param=details.get("param"),
        retry_after=_seconds(error.get("retry_after")),
        details=details or None,
        request_id=request_id,
    )
