"""An answer that broke on its way is billed once, at least as far as it came, and is never asked for again."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest
from clients.golden.server import Platform
from clients.golden.transcripts import ADMIN

from dfastllm_client import AsyncClient, AsyncTokenStream, AsyncWebSocketClient, Backoff, ConnectionLostError


class Cable:
    """A TCP proxy before the server, whose connections can be cut."""

    def __init__(self, port: int) -> None:
        self.port = port
        self.made = 0
        self._ends: list[asyncio.StreamWriter] = []

    async def connect(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.made += 1
        far_reader, far_writer = await asyncio.open_connection("127.0.0.1", self.port)
        self._ends += [writer, far_writer]
        await asyncio.gather(_carry(reader, far_writer), _carry(far_reader, writer))

    def cut(self) -> None:
        for end in self._ends:
            end.transport.abort()
        self._ends.clear()


async def _carry(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    try:
        while data := await reader.read(65536):
            writer.write(data)
    except OSError:
        pass
    finally:
        writer.close()


@asynccontextmanager
async def cable(url: str) -> AsyncIterator[tuple[Cable, str]]:
    made = Cable(int(url.rpartition(":")[2]))
    async with await asyncio.start_server(made.connect, "127.0.0.1", 0) as server:
        yield made, f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        made.cut()


async def broken(platform: Platform, transport: str) -> tuple[Any, list[Any], int]:
    """What had come of a stream that was cut, the tenant's usage afterwards, and how many connections there were."""
    name = f"cut-{transport}"
    async with AsyncClient(platform.live.url, platform.keys[ADMIN]) as admin:
        await admin.request("POST", "/admin/v1/tenants", {"name": name})
        made = await admin.request("POST", "/admin/v1/keys", {"tenant": name, "scopes": ["generate", "usage"]})
    key, quick = made["key"], Backoff(attempts=5, first=0.0)
    async with cable(platform.live.url) as (line, url), AsyncClient(platform.live.url, key) as direct:
        kind = AsyncClient if transport == "http" else AsyncWebSocketClient
        async with kind(url, key, model="demo-ar", backoff=quick) as client:
            stream = client.generate_stream("Count: 1 2 3", max_tokens=400, ignore_eos=True)
            with pytest.raises(ConnectionLostError) as caught:
                await _cut_after_three(stream, line)
            await client.health()  # the client goes on
        lines: list[Any] = []
        for _ in range(200):
            lines = list((await direct.usage())["data"])
            if lines and lines[0]["cancelled"]:
                break
            await asyncio.sleep(0.05)
        return caught.value.received, lines, line.made


async def _cut_after_three(stream: AsyncTokenStream, line: Cable) -> None:
    async for piece in stream:
        if piece.index == 3:
            line.cut()


@pytest.mark.parametrize("transport", ["http", "ws"])
def test_a_cut_stream_is_billed_once(golden: Platform, transport: str) -> None:
    received, lines, connections = asyncio.run(broken(golden, transport))
    assert received.tokens >= 4
    [line] = lines
    assert (line["requests"], line["cancelled"], line["ok"]) == (1, 1, 0)
    assert received.tokens <= line["completion_tokens"] < 400
    assert connections >= 2, "the client came back"
