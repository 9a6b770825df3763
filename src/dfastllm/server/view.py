"""GET /admin/v1/view: what the server does now, in one answer; `dfastllm top` shows it.

It tells of everybody: `access` asks for the scope `admin`, where there are keys at all.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from importlib.metadata import version

from fastapi import Request as HttpRequest
from fastapi.responses import Response
from pydantic import Field

from dfastllm.server.jobs import Job
from dfastllm.server.replies import Out, dump
from dfastllm.server.serving import Serving

__all__ = ["AdapterView", "ModelView", "RequestView", "TenantView", "View", "view"]

MOST = 100  # requests in an answer, the oldest first


class ModelView(Out):
    name: str
    kind: str
    running: int = Field(description="Requests with a place in the batch.")
    waiting: int
    tokens_per_second: float = Field(description="Tokens decided, of the last seconds.")
    steps_per_second: float
    tokens_per_forward: float | None = Field(description="Tokens decided for each sequence of a step.")
    pages: int = Field(description="Pages of K,V in use, those of shared beginnings included.")
    pages_total: int
    prefix_hits: float | None = Field(description="Part of the prompt tokens looked up that were found in shared K,V.")
    accepted: float | None = Field(description="Part of the drafted tokens that stood.")


class AdapterView(Out):
    name: str
    model: str
    rank: int
    bytes: int
    in_memory: bool
    running: int = Field(description="Requests that hold it.")


class TenantView(Out):
    name: str
    requests: int = Field(description="That wait or run.")
    tokens: int = Field(description="Output tokens of these so far.")


class RequestView(Out):
    id: str = Field(description="DELETE /v1/requests/{id} ends it.")
    model: str
    tenant: str
    adapter: str
    seconds: float = Field(description="Since it came.")
    prompt_tokens: int
    tokens: int = Field(description="Output tokens so far.")


class View(Out):
    version: str
    phase: str
    uptime_seconds: float
    models: list[ModelView]
    adapters: list[AdapterView]
    tenants: list[TenantView]
    requests: list[RequestView] = Field(description=f"The oldest {MOST}.")
    requests_total: int


async def view(request: HttpRequest) -> Response:
    """Models, adapters, tenants and requests as they are now."""
    serving: Serving = request.app.state.serving
    return Response(dump(_seen(serving)), media_type="application/json")


def _seen(serving: Serving) -> View:
    now = time.monotonic()
    requests = sorted(_requests(serving, now), key=lambda one: -one.seconds)
    tenants: dict[str, TenantView] = {}
    for one in requests:
        seen = tenants.setdefault(one.tenant, TenantView(name=one.tenant, requests=0, tokens=0))
        seen.requests += 1
        seen.tokens += one.tokens
    return View(
        version=version("dfastllm"),
        phase=serving.phase,
        uptime_seconds=round(now - serving.started, 3),
        models=[_model(serving, name) for name in serving.models],
        adapters=list(_adapters(serving)),
        tenants=sorted(tenants.values(), key=lambda one: (-one.requests, one.name)),
        requests=requests[:MOST],
        requests_total=len(requests),
    )


def _model(serving: Serving, name: str) -> ModelView:
    rates = serving.activity[name].rates()
    return ModelView(
        name=name,
        kind=serving.models[name].info.kind,
        running=rates.running,
        waiting=rates.waiting,
        tokens_per_second=round(rates.tokens_per_second, 1),
        steps_per_second=round(rates.steps_per_second, 1),
        tokens_per_forward=_rounded(rates.tokens_per_forward),
        pages=rates.pages,
        pages_total=rates.pages_total,
        prefix_hits=_rounded(rates.prefix_hits),
        accepted=_rounded(rates.accepted),
    )


def _rounded(value: float | None) -> float | None:
    return None if value is None else round(value, 3)


def _adapters(serving: Serving) -> Iterator[AdapterView]:
    engines = serving.worker.engines if serving.worker is not None else {}
    for model, engine in engines.items():
        held = engine.adapters.held()
        for named in engine.adapters.named():
            yield AdapterView(
                name=named.name,
                model=model,
                rank=named.rank,
                bytes=named.size,
                in_memory=engine.adapters.in_memory(named.name),
                running=held.get(named.hash, 0),
            )


def _requests(serving: Serving, now: float) -> Iterator[RequestView]:
    """One a call, whatever its number of prompts and choices."""
    for job in list(serving.jobs.values()):
        if not isinstance(job, Job) or not job.requests:
            continue
        first = job.requests[0]
        yield RequestView(
            id=job.id,
            model=job.model,
            tenant=job.identity.tenant.name,
            adapter=first.lora,
            seconds=round(now - first.arrival, 3),
            prompt_tokens=sum(len(one.prompt) + len(one.suffix) for one in job.requests),
            tokens=sum(one.tokens for one in job.timings),
        )
