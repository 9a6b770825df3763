"""A WebSocket has none of the clocks of HTTP: it may be quiet for longer than a head or a body may take."""

from __future__ import annotations

import asyncio
import json

from websockets.asyncio.client import connect

from tests.kit.live import serving
from tests.kit.served import random_engine


async def quiet_then_asks(url: str) -> str:
    async with connect(f"{url.replace('http', 'ws', 1)}/ws", ping_interval=None) as socket:
        await socket.recv()
        await asyncio.sleep(0.5)
        await socket.send(json.dumps({"id": "1", "function": "health"}))
        return str(json.loads(await asyncio.wait_for(socket.recv(), 10))["status"])


def test_a_quiet_connection_stays() -> None:
    clocks = {"body_timeout": 0.2, "header_timeout": 0.2, "keep_alive_timeout": 0.2}
    with serving({"causal": random_engine("llama")}, **clocks) as live:
        assert asyncio.run(quiet_then_asks(live.url)) == "complete"
