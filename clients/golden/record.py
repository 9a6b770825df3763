"""Records the golden transcripts: the Python client against a real server with demo models, with a tap on the wire.

    python -m clients.golden.record [SCENARIO ...]

Look at what `git diff clients/golden` says afterwards: a changed line is a changed protocol, or a changed model.
"""

from __future__ import annotations

import asyncio
import json
import sys
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress
from pathlib import Path
from typing import Any

import httpx
from clients.golden.scenarios import SCENARIOS, played
from clients.golden.server import Platform, golden_server
from clients.golden.transcripts import Line, Scenario, Transcript, ordered, settled
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

__all__ = ["HttpTap", "exchange_of", "record", "ws_tap"]


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
            code = server.close_code
            await client.close(1011 if code is None or code == 1006 else code, server.close_reason or "")

    async with serve(forward, "127.0.0.1", 0) as proxy:
        yield f"ws://127.0.0.1:{next(iter(proxy.sockets)).getsockname()[1]}/ws"


async def record(scenario: Scenario, platform: Platform) -> Transcript:
    """Play a scenario against the server, and write down what is said."""
    url, key = platform.live.url, platform.keys.get(scenario.api_key or "", scenario.api_key)
    if scenario.transport == "http":
        tap = HttpTap()
        outcomes = await played(scenario, url, key, tap)
        return Transcript(scenario, settled(outcomes), settled(tap.lines))
    lines: list[Line] = []
    async with ws_tap(f"{url.replace('http', 'ws', 1)}/ws", lines) as tapped:
        outcomes = await played(scenario, tapped, key)
    named = [{"client": {**line["client"], "api_key": scenario.api_key}} if _auth(line) else line for line in lines]
    return Transcript(scenario, settled(outcomes), settled(ordered(named, scenario.at_once)))


def _auth(line: Line) -> bool:
    return "api_key" in line.get("client", {})


if __name__ == "__main__":
    wanted = set(sys.argv[1:])
    with tempfile.TemporaryDirectory() as folder, golden_server(Path(folder)) as platform:
        for scenario in SCENARIOS:
            if not wanted or scenario.name in wanted:
                made = asyncio.run(record(scenario, platform))
                made.save()
                print(f"{made.path.name}: {len(made.lines)} lines")
