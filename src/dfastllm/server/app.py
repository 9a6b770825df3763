"""The ASGI application: a list of routes and a list of middleware over the engines that a worker steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.routing import APIRoute
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute

from dfastllm.errors import DFastLLMError
from dfastllm.metrics import Metrics
from dfastllm.server import routes
from dfastllm.server.chat import chat_completions
from dfastllm.server.completions import completions
from dfastllm.server.middleware import ApiKey, BodyLimit, Trace
from dfastllm.server.refusals import http_refusal, known_refusal, validation_refusal
from dfastllm.server.replies import ChatCompletion, Completion
from dfastllm.server.serving import Serving
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.engine import Engine, Worker

__all__ = ["create_app"]


def _route(method: str, path: str, endpoint: Callable[..., Any], model: Any = None, **options: Any) -> APIRoute:
    if model is not None:
        options["responses"] = {200: {"model": model}}
    return APIRoute(path, endpoint, methods=[method], response_model=None, **options)


def _routes() -> list[BaseRoute]:
    return [
        _route("POST", "/v1/completions", completions, Completion),
        _route("POST", "/v1/chat/completions", chat_completions, ChatCompletion),
        _route("GET", "/v1/models", routes.models),
        _route("GET", "/v1/models/{model_id:path}", routes.model_card),
        _route("DELETE", "/v1/requests/{request_id}", routes.cancel_request),
        _route("POST", "/tokenize", routes.tokenize),
        _route("POST", "/detokenize", routes.detokenize),
        _route("GET", "/health", routes.health),
        _route("GET", "/health/live", routes.live),
        _route("GET", "/health/ready", routes.ready),
        _route("GET", "/version", routes.version_info),
        _route("GET", "/metrics", routes.metrics),
        _route("GET", "/openapi.json", routes.openapi, include_in_schema=False),
        _route("GET", "/docs", routes.docs, include_in_schema=False),
    ]


def _middleware(settings: Settings, metrics: Metrics) -> list[Middleware]:
    """Outermost first. Cross-origin answers come before the key: a browser's preflight carries none."""
    layers = [Middleware(Trace, observe=metrics.answered)]
    if settings.allowed_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "POST", "DELETE"],
                allow_headers=["Authorization", "Content-Type", "X-Request-ID"],
                expose_headers=["X-Request-ID", "Retry-After"],
            )
        )
    if settings.api_key is not None:
        layers.append(Middleware(ApiKey, key=settings.api_key))
    layers.append(Middleware(BodyLimit, limit=settings.max_body_bytes))
    return layers


def create_app(
    worker: Worker | None = None, engines: Mapping[str, Engine] | None = None, settings: Settings | None = None
) -> FastAPI:
    """The application over a started worker and its engines by name. Without them it answers 503 until
    `app.state.serving.open(worker, engines)` is called, which is how the server is up while it loads."""
    settings = settings or Settings()
    metrics = Metrics()
    serving = Serving(settings, metrics)
    app = FastAPI(
        title="dfastllm",
        version=version("dfastllm"),
        description="Diffusion and autoregressive language models behind the OpenAI API.",
        routes=_routes(),
        middleware=_middleware(settings, metrics),
        exception_handlers={
            DFastLLMError: known_refusal,
            RequestValidationError: validation_refusal,
            HTTPException: http_refusal,
        },
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.state.serving = serving
    if worker is not None and engines is not None:
        serving.open(worker, engines)
    return app
