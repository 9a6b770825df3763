"""A run begun for an identity, over any transport: each step is a request like any other, with its bounds, limits,
metrics and ledger."""

from __future__ import annotations

from collections.abc import AsyncGenerator, Awaitable, Callable, Mapping
from contextlib import aclosing
from itertools import count
from typing import Any

from dfastllm.errors import GenerationError
from dfastllm.server.calls import Call
from dfastllm.server.chat import chat_call
from dfastllm.server.completions import completion_call
from dfastllm.server.pipelines.run import Ask, run_pipeline
from dfastllm.server.pipelines.schema import PipelineEvent, PipelineResult
from dfastllm.server.schemas import ChatRequest, CompletionRequest, GenerationRequest
from dfastllm.server.serving import Serving
from dfastllm.tenants import Identity

__all__ = ["begun", "result_of"]


def _asking(serving: Serving, identity: Identity, request_id: str) -> Ask:
    """What makes a step's request a call of this identity. request_id: of the run; each step's gets a number."""
    numbers = count(1)

    async def ask(body: GenerationRequest) -> Call[Any]:
        name = f"{request_id[:120]}-{next(numbers)}"
        if isinstance(body, ChatRequest):
            return await chat_call(serving, identity, body, name)
        assert isinstance(body, CompletionRequest)
        return await completion_call(serving, identity, body, name)

    return ask


async def begun(
    serving: Serving, identity: Identity, request_id: str, name: str, given: str | Mapping[str, Any]
) -> AsyncGenerator[PipelineEvent]:
    """The events of a run of one of the identity's pipelines, over any transport. Raises NotReadyError and
    PipelineNotFoundError; the events raise what the run does."""
    serving.require_ready()
    pipeline = await serving.pipelines.get(identity, name)
    ask = _asking(serving, identity, request_id)
    return run_pipeline(pipeline, given, ask, timeout=serving.settings.request_timeout)


async def result_of(
    events: AsyncGenerator[PipelineEvent], tell: Callable[[PipelineEvent], Awaitable[None]] | None = None
) -> PipelineResult:
    """The last event of a run, which closes it. tell: is given those before. Raises what the run raises."""
    async with aclosing(events):
        async for event in events:
            if isinstance(event, PipelineResult):
                return event
            if tell is not None:
                await tell(event)
    raise GenerationError("the pipeline ended without a result.")
