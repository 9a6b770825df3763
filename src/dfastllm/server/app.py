"""The ASGI application: a list of routes and a list of middleware over the engines that a worker steps."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from starlette.exceptions import HTTPException
from starlette.middleware import Middleware
from starlette.middleware.cors import CORSMiddleware
from starlette.routing import BaseRoute, WebSocketRoute

from dfastllm.errors import DFastLLMError
from dfastllm.metrics import Metrics
from dfastllm.server import admin, routes, view
from dfastllm.server.access import Access, Keys
from dfastllm.server.chat import chat_completions
from dfastllm.server.completions import completions
from dfastllm.server.middleware import BodyLimit, Head, Trace
from dfastllm.server.openapi import description, responses, stream
from dfastllm.server.pipelines import routes as pipelines
from dfastllm.server.pipelines import schema
from dfastllm.server.pipelines.kept import Pipelines
from dfastllm.server.reading import Route
from dfastllm.server.refusals import http_refusal, known_refusal, no_socket, parameter_refusal
from dfastllm.server.replies import (
    AdapterGone,
    Cancelled,
    ChatChunk,
    ChatCompletion,
    Completion,
    CompletionChunk,
    Health,
    ModelCard,
    ModelList,
    Out,
    Text,
    Tokens,
    Versions,
)
from dfastllm.server.serving import Serving
from dfastllm.server.ws.protocol import CLIENT_FRAMES, SERVER_FRAMES
from dfastllm.server.ws.session import Front
from dfastllm.settings import Settings

if TYPE_CHECKING:
    from dfastllm.engine import Engine, Worker

__all__ = ["create_app"]


_GENERATING = (400, 404, 413, 429, 499, 500, 503, 504)
_READING = (400, 404, 413, 503)
_LOADING = (400, 403, 404, 413, 500, 503)
_EVENTS: tuple[type[Out], ...] = (ChatChunk, CompletionChunk, *schema.EVENTS, *SERVER_FRAMES)
_METRICS = {
    "text/plain": {"schema": {"type": "string"}},
    "application/openmetrics-text": {"schema": {"type": "string"}},
}


def _route(
    method: str,
    path: str,
    endpoint: Callable[..., Any],
    reply: type[Out] | None = None,
    refusals: tuple[int, ...] = (),
    **more: Any,
) -> Route:
    """A row of the table. more: what else a good answer may be, in OpenAPI's words."""
    declared = responses(reply, refusals, **more)
    if path.startswith("/health"):
        declared[503] = {"model": Health, "description": "Not now."}
    return Route(path, endpoint, methods=[method], response_model=None, response_class=Response, responses=declared)


def _admin_routes() -> list[BaseRoute]:
    """Of a server with a database of tenants."""
    a, made, asked = admin, (400, 403, 404, 413, 503), (400, 403, 404, 503)
    return [
        _route("GET", "/v1/usage", a.own_usage, a.UsageList, (400, 403, 503)),
        _route("GET", "/admin/v1/tenants", a.tenants, a.TenantList, (403, 503)),
        _route("POST", "/admin/v1/tenants", a.create_tenant, a.TenantCard, made),
        _route("GET", "/admin/v1/tenants/{tenant}", a.tenant_card, a.TenantCard, asked),
        _route("POST", "/admin/v1/tenants/{tenant}", a.set_tenant, a.TenantCard, made),
        _route("GET", "/admin/v1/keys", a.keys, a.KeyList, asked),
        _route("POST", "/admin/v1/keys", a.create_key, a.NewKeyCard, made),
        _route("POST", "/admin/v1/keys/{key}/rotate", a.rotate_key, a.NewKeyCard, made),
        _route("DELETE", "/admin/v1/keys/{key}", a.disable_key, a.KeyCard, asked),
        _route("GET", "/admin/v1/usage", a.usage, a.UsageList, asked),
        _route("GET", "/admin/v1/audit", a.audit, a.AuditList, asked),
    ]


def _pipeline_routes() -> list[BaseRoute]:
    p, t, one, known = pipelines, schema, "/v1/pipelines/{name}", (403, 404, 503)
    told = stream(*t.EVENTS)
    return [
        _route("POST", "/v1/pipelines", p.save_pipeline, t.PipelineCard, (400, 403, 413, 503)),
        _route("GET", "/v1/pipelines", p.list_pipelines, t.PipelineList, (403, 503)),
        _route("GET", one, p.show_pipeline, t.PipelineDetail, known),
        _route("DELETE", one, p.delete_pipeline, t.PipelineDeleted, (400, *known)),
        _route("POST", one + "/run", p.run_route, t.PipelineResult, (403, *_GENERATING), content=told),
    ]


def _routes(settings: Settings) -> list[BaseRoute]:
    pages: list[tuple[str, Callable[..., Any]]] = [
        ("/", routes.home),
        ("/docs", routes.docs),
        ("/openapi.json", routes.openapi),
        (Front.path, routes.upgrade),
    ]
    return [
        *(() if settings.tenants_db is None else _admin_routes()),
        _route("POST", "/v1/completions", completions, Completion, _GENERATING, content=stream(CompletionChunk)),
        _route(
            "POST", "/v1/chat/completions", chat_completions, ChatCompletion, _GENERATING, content=stream(ChatChunk)
        ),
        _route("GET", "/v1/models", routes.models, ModelList, (503,)),
        _route("GET", "/v1/models/{model_id:path}", routes.model_card, ModelCard, (404, 503)),
        _route("POST", "/v1/load_lora_adapter", routes.load_lora_adapter, ModelCard, _LOADING),
        _route("POST", "/v1/unload_lora_adapter", routes.unload_lora_adapter, AdapterGone, _LOADING),
        _route("DELETE", "/v1/requests/{request_id}", routes.cancel_request, Cancelled, (404,)),
        *_pipeline_routes(),
        _route("GET", "/admin/v1/view", view.view, view.View, (403,)),
        _route("POST", "/tokenize", routes.tokenize, Tokens, _READING),
        _route("POST", "/detokenize", routes.detokenize, Text, _READING),
        _route("GET", "/health", routes.health, Health),
        _route("GET", "/health/live", routes.live, Health),
        _route("GET", "/health/ready", routes.ready, Health),
        _route("GET", "/version", routes.version_info, Versions),
        _route("GET", "/metrics", routes.metrics, content=_METRICS),
        WebSocketRoute(Front.path, Front()),
        *(Route(path, endpoint, methods=["GET"], include_in_schema=False) for path, endpoint in pages),
    ]


def _middleware(settings: Settings, metrics: Metrics, keys: Keys) -> list[Middleware]:
    """Outermost first. Cross-origin answers come before the key: a browser's preflight carries none."""
    layers = [Middleware(Head), Middleware(Trace, observe=metrics.answered)]
    if settings.allowed_origins:
        layers.append(
            Middleware(
                CORSMiddleware,
                allow_origins=settings.allowed_origins,
                allow_methods=["GET", "HEAD", "POST", "DELETE"],
                allow_headers=["*"],  # a preflight's own list comes back: SDKs send many x-stainless-* headers
                expose_headers=["X-Request-ID", "Retry-After"],
            )
        )
    layers.append(Middleware(Access, keys=keys))
    layers.append(Middleware(BodyLimit, limit=settings.max_body_bytes))
    return layers


class _App(FastAPI):
    """FastAPI with the description of `openapi`."""

    def openapi(self) -> dict[str, Any]:
        if self.openapi_schema is None:
            serving: Serving = self.state.serving
            info = {"title": self.title, "version": self.version, "description": self.description}
            how = {"keyed": serving.keys.wanted, "tenants": serving.tenants is not None}
            self.openapi_schema = description(info, list(self.routes), _EVENTS, CLIENT_FRAMES, **how)
        return self.openapi_schema


def create_app(
    worker: Worker | None = None, engines: Mapping[str, Engine] | None = None, settings: Settings | None = None
) -> FastAPI:
    """The application over a started worker and its engines by name. Without them it answers 503 until
    `app.state.serving.open(worker, engines)` is called, which is how the server is up while it loads. Raises what
    opening the database of tenants raises."""
    settings = settings or Settings()
    metrics = Metrics()
    serving = Serving(settings, metrics)
    serving.pipelines = Pipelines(settings.pipelines, lambda: serving.tenants)
    app = _App(
        title="dfastllm",
        version=version("dfastllm"),
        description="Diffusion and autoregressive language models behind the OpenAI API.",
        routes=_routes(settings),
        middleware=_middleware(settings, metrics, serving.keys),
        exception_handlers={
            DFastLLMError: known_refusal,
            HTTPException: http_refusal,
            RequestValidationError: parameter_refusal,
        },
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
    )
    app.router.default = no_socket
    app.state.serving = serving
    if worker is not None and engines is not None:
        serving.open(worker, engines)
    return app
