"""Client of dfastllm servers: HTTP and WebSocket, sync and async.

    from dfastllm_client import Client
    with Client("http://127.0.0.1:8000") as client:
        print(client.generate("What is 12 + 30?", model="demo-ar").text)

`RealmWebSocketClient` and the names beside it are those of Realm's client, over the same code.
"""

from __future__ import annotations

from .backoff import Backoff
from .errors import (
    AuthenticationError,
    CancelledError,
    ClientError,
    ConnectionFailedError,
    ConnectionLostError,
    ErrorInfo,
    InvalidRequestError,
    NotFoundError,
    NotReadyError,
    PermissionDeniedError,
    ProtocolError,
    RateLimitError,
    Received,
    ServerError,
    TimeoutError,
)
from .http import AsyncClient
from .options import GenerationOptions
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
from .streams import AsyncPipelineStream, AsyncStream, AsyncTokenStream
from .sync import Client, PipelineStream, Stream, TokenStream, WebSocketClient
from .websocket import AsyncWebSocketClient
from .wire import CanvasEvent

__all__ = [
    "AsyncClient",
    "AsyncPipelineStream",
    "AsyncStream",
    "AsyncTokenStream",
    "AsyncWebSocketClient",
    "AuthenticationError",
    "Backoff",
    "CancelledError",
    "CanvasEvent",
    "Client",
    "ClientError",
    "ConnectionFailedError",
    "ConnectionLostError",
    "ErrorInfo",
    "FunctionMetadata",
    "GenerationOptions",
    "GenerationResult",
    "HealthStatus",
    "InvalidRequestError",
    "NotFoundError",
    "NotReadyError",
    "ParamMetadata",
    "PermissionDeniedError",
    "PipelineEvent",
    "PipelineResult",
    "PipelineStream",
    "ProtocolError",
    "RateLimitError",
    "RealmWebSocketClient",
    "Received",
    "RuntimeMetadata",
    "ServerError",
    "Stream",
    "TimeoutError",
    "TokenData",
    "TokenStream",
    "WebSocketClient",
]

RealmWebSocketClient = AsyncWebSocketClient
