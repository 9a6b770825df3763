"""The request of a step becomes a call as any other request does: the same bounds, limits, metrics and ledger."""

from __future__ import annotations

from itertools import count
from typing import Any

from dfastllm.server.calls import Call
from dfastllm.server.chat import chat_call
from dfastllm.server.completions import completion_call
from dfastllm.server.pipelines.run import Ask
from dfastllm.server.schemas import ChatRequest, CompletionRequest, GenerationRequest
from dfastllm.server.serving import Serving
from dfastllm.tenants import Identity

__all__ = ["asking"]


def asking(serving: Serving, identity: Identity, request_id: str) -> Ask:
    """What makes a step's request a call of this identity. request_id: of the run; each step's gets a number."""
    numbers = count(1)

    async def ask(body: GenerationRequest) -> Call[Any]:
        name = f"{request_id[:120]}-{next(numbers)}"
        if isinstance(body, ChatRequest):
            return await chat_call(serving, identity, body, name)
        assert isinstance(body, CompletionRequest)
        return await completion_call(serving, identity, body, name)

    return ask
