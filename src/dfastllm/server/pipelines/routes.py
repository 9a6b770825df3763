"""The pipelines of a server over HTTP: kept, listed, deleted, and run with one answer or as a stream of events."""

from __future__ import annotations

from collections.abc import AsyncGenerator
from contextlib import aclosing

from fastapi import Request as HttpRequest
from fastapi.responses import Response

from dfastllm.server.access import identity_of
from dfastllm.server.jobs import while_connected
from dfastllm.server.pipelines.asking import begun, result_of
from dfastllm.server.pipelines.schema import (
    PipelineBody,
    PipelineDeleted,
    PipelineDetail,
    PipelineEvent,
    PipelineList,
    RunBody,
)
from dfastllm.server.replies import dump
from dfastllm.server.serving import Serving
from dfastllm.server.sse import EventStream

__all__ = ["delete_pipeline", "list_pipelines", "run_route", "save_pipeline", "show_pipeline"]


def _json(out: object) -> Response:
    return Response(dump(out), media_type="application/json")  # type: ignore[arg-type]


async def save_pipeline(body: PipelineBody, request: HttpRequest) -> Response:
    """Keep a pipeline, in place of one of that name. The body is JSON, or YAML as application/yaml."""
    serving: Serving = request.app.state.serving
    serving.require_ready()
    return _json((await serving.pipelines.save(identity_of(request), body)).card())


async def list_pipelines(request: HttpRequest) -> Response:
    """The pipelines that this key may run."""
    serving: Serving = request.app.state.serving
    return _json(PipelineList(data=[one.card() for one in await serving.pipelines.all(identity_of(request))]))


async def show_pipeline(name: str, request: HttpRequest) -> Response:
    """One pipeline."""
    serving: Serving = request.app.state.serving
    pipeline = await serving.pipelines.get(identity_of(request), name)
    document = pipeline.body.model_dump(exclude_none=True)
    return _json(PipelineDetail(**pipeline.card().model_dump(), document=document))


async def delete_pipeline(name: str, request: HttpRequest) -> Response:
    """Forget a pipeline; runs of it that have begun go on."""
    serving: Serving = request.app.state.serving
    await serving.pipelines.delete(identity_of(request), name)
    return _json(PipelineDeleted(name=name, deleted=True))


async def run_route(body: RunBody, request: HttpRequest, name: str) -> Response:
    """Run a pipeline: one answer at its end, or with `stream` its events as they come."""
    serving: Serving = request.app.state.serving
    events = await begun(serving, identity_of(request), request.state.request_id, name, body.input)
    if body.stream:
        return EventStream(_texts(events), lambda: None)
    return _json(await while_connected(request, result_of(events)))


async def _texts(events: AsyncGenerator[PipelineEvent]) -> AsyncGenerator[str]:
    async with aclosing(events):
        async for event in events:
            yield dump(event)
