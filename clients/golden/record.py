"""Records the golden transcripts: the Python client against a real server with demo models, with a tap on the wire.

    python -m clients.golden.record [SCENARIO ...]

Look at what `git diff clients/golden` says afterwards: a changed line is a changed protocol, or a changed model.
"""

from __future__ import annotations

import asyncio
import json
import sys
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager, contextmanager, suppress
from typing import Any

import httpx
from clients.golden.scenarios import SCENARIOS, played
from clients.golden.transcripts import KEY, Line, Scenario, Transcript, ordered, settled
from tests.kit.live import Live, serving
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

__all__ = ["HttpTap", "exchange_of", "golden_server", "record", "ws_tap"]

MODELS = ("demo-ar", "demo-diffusion")


@contextmanager
def golden_server() -> Iterator[Live]:
    """The server that transcripts come from."""
    from dfastllm.engine import EngineConfig
    from dfastllm.llm import load_engine

    engines = {name: load_engine(name, config=EngineConfig(kv_tokens=16384)) for name in MODELS}
    with serving(engines, api_key=KEY) as live:
        yield live


class HttpTap(httpx.AsyncBaseTransport):
    """Sends what it is given, and keeps both sides in `lines`."""

    def __init__(self) -> None:
        self.lines: list[Line] = []
        self._inner = httpx.AsyncHTTPTransport()

    async def handle_async_request(self, request: httpx.Request) -> httpx.Response:
        body = json.loads(await request.aread() or b"null")
        self.lines.append({"request": {"method": request.method, "path": request.url.raw_path.decode(), "body": body}})
        response = await self._inner.handle_async_request(request)
        content = await response.aread()
        self.lines.append({"response": exchange_of(response.status_code, response.headers, content)})
        return httpx.Response(response.status_code, headers=response.headers, content=content, request=request)

    async def aclose(self) -> None:
        await self._inner.aclose()


def exchange_of(status: int, headers: Any, content: bytes) -> dict[str, Any]:
    """An answer as a transcript has it: its JSON, or the events of its stream ("[DONE]" included)."""
    kept = {name: headers[name] for name in ("content-type", "retry-after") if name in headers}
    if kept.get("content-type", "").startswith("text/event-stream"):
        events = [line[6:] for line in content.decode().splitlines() if line.startswith("data: ")]
        return {
            "status": status,
            "headers": kept,
            "events": [event if event == "[DONE]" else json.loads(event) for event in events],
        }
    return {"status": status, "headers": kept, "body": json.loads(content)}


@asynccontextmanager
async def ws_tap(url: str, lines: list[Line]) -> AsyncIterator[str]:
    """A proxy before the WebSocket at `url`, which keeps both sides in `lines`; its own url."""

    async def forward(client: ServerConnection) -> None:
        async with connect(url) as server:

            async def outward() -> None:
                with suppress(ConnectionClosed):
                    async for text in client:
                        lines.append({"client": json.loads(text)})
                        await server.send(text)
                await server.close()

            sending = asyncio.create_task(outward())
            with suppress(ConnectionClosed):
                async for text in server:
                    lines.append({"server": json.loads(text)})
                    await client.send(text)
            sending.cancel()
            await client.close(server.close_code if server.close_code != 1006 else 1011, server.close_reason or "")

    async with serve(forward, "127.0.0.1", 0) as proxy:
        yield f"ws://127.0.0.1:{next(iter(proxy.sockets)).getsockname()[1]}/ws"


async def record(scenario: Scenario, url: str) -> Transcript:
    """Play a scenario against the server at `url` (http://...), and write down what is said."""
    if scenario.transport == "http":
        tap = HttpTap()
        outcomes = await played(scenario, url, tap)
        return Transcript(scenario, outcomes, settled(tap.lines))
    lines: list[Line] = []
    async with ws_tap(f"{url.replace('http', 'ws', 1)}/ws", lines) as tapped:
        outcomes = await played(scenario, tapped)
    return Transcript(scenario, outcomes, settled(ordered(lines, scenario.at_once)))


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    with golden_server() as live:
        for scenario in SCENARIOS:
            if not wanted or scenario.name in wanted:
                made = asyncio.run(record(scenario, live.url))
                made.save()
                print(f"{made.path.name}: {len(made.lines)} lines")
