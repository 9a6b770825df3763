"""How long a request takes from the route to its first planned span: reading its options, admission, the way to the
engine's thread, its place among the running sequences. No forward pass is in it.

`python FILE` with another installation's interpreter measures that one.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from starlette.requests import Request as HttpRequest

from dfastllm.decode.registry import POLICIES
from dfastllm.engine import Worker
from dfastllm.llm import load_engine
from dfastllm.metrics.records import Spread, spread
from dfastllm.server.app import create_app
from dfastllm.server.completions import completions
from dfastllm.server.schemas import CompletionRequest
from dfastllm.settings import Settings

__all__ = ["MODELS", "admission"]

MODELS = ("demo-ar", "demo-diffusion")
PAUSE = 0.003  # seconds between two requests, in which the engine's thread ends its turn and goes to sleep


def admission(model: str, prompt: int = 40, repeats: int = 300) -> Spread:
    """Microseconds from a parsed body to the first planned span of a request alone, with a prompt of so many ids. The
    first tenth is not counted."""
    engine = load_engine(model)
    ids = [i for i in range(engine.info.vocab_size) if i not in (engine.info.mask_id, *engine.info.eos_ids)]
    with Worker({model: engine}) as worker, _planned(POLICIES[engine.info.kind]) as planned:
        app = create_app(worker, {model: engine}, Settings())
        times = asyncio.run(_ask(app, model, ids[:prompt], planned, repeats))
    return spread(times[repeats // 10 :])


async def _ask(app: Any, model: str, ids: list[int], planned: list[float], repeats: int) -> list[float]:
    body = CompletionRequest.model_validate({"model": model, "prompt": ids, "max_tokens": 2})
    times = []
    for number in range(repeats):
        scope = {"type": "http", "app": app, "headers": [], "state": {"request_id": f"r{number}"}}
        planned.clear()
        await asyncio.sleep(PAUSE)
        began = time.perf_counter()
        await completions(body, HttpRequest(scope, _never))
        times.append((planned[0] - began) * 1e6)
    return times


async def _never() -> Any:
    """The client neither sends more nor goes away."""
    await asyncio.Event().wait()


@contextmanager
def _planned(policy: Any) -> Iterator[list[float]]:
    """When the policy was asked for spans, on time.perf_counter()."""
    kind, times = type(policy), []
    real = kind.plan

    def plan(*args: Any) -> Any:
        times.append(time.perf_counter())
        return real(*args)

    kind.plan = plan
    try:
        yield times
    finally:
        kind.plan = real


if __name__ == "__main__":
    for name in MODELS:
        print(name, admission(name))
