"""The same questions over /ws: several calls at once on a connection, and what no client should do to one."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.kit.sockets import raw_frame
from tests.soak.deck import Choice, Question, assembled, outcome
from tests.soak.wire import Wire

__all__ = ["bad_frames", "choices", "open_socket", "reads_no_frames", "send_call"]

UPGRADE = (
    b"GET /ws HTTP/1.1\r\nHost: localhost\r\nConnection: Upgrade\r\nUpgrade: websocket\r\n"
    b"Sec-WebSocket-Version: 13\r\nSec-WebSocket-Key: dGhlIHNhbXBsZSBub25jZQ==\r\n\r\n"
)
ENDING = (
    raw_frame(2, b"{}"),
    raw_frame(1, b"\xff"),
    raw_frame(1, b"{}", masked=False),
    raw_frame(0, b"x"),
    raw_frame(1, b"", final=False) + raw_frame(0, b"", final=False) * 20_000,
    b"\x81\xff" + (1 << 40).to_bytes(8, "big") + b"xxxx",
    raw_frame(1, b"nonsense") * 40,
)


@contextlib.asynccontextmanager
async def open_socket(address: tuple[str, int]) -> AsyncIterator[ClientConnection]:
    url = f"ws://{address[0]}:{address[1]}/ws"
    async with connect(url, compression=None, proxy=None, open_timeout=60, ping_timeout=None, max_size=None) as ws:
        assert json.loads(await ws.recv())["status"] == "connected"
        yield ws


async def send_call(ws: ClientConnection, id: str, question: Question, *, stream: bool) -> None:
    params = {**question.body, **({"stream": True} if stream else {})}
    await ws.send(json.dumps({"id": id, "function": "generate", "params": params}))


def choices(frames: Sequence[Mapping[str, Any]]) -> list[Choice]:
    """Of a call that completed: its frames, the last one included."""
    data = frames[-1]["data"]
    if "choices" in data:
        return outcome(data)
    parts = [frame["data"] for frame in frames[:-1]]
    return assembled({"choices": [{**part, "index": part["choice"], "delta": _delta(part)}]} for part in parts)


def _delta(part: Mapping[str, Any]) -> dict[str, Any]:
    return {"content": part["text"], "tool_calls": part.get("tool_calls")}


async def bad_frames(address: tuple[str, int], rng: random.Random, seconds: float) -> str | None:
    """Frames that are none, or are not taken: a close frame, and the connection ends."""
    async with Wire.open(address) as wire:
        await wire.send(UPGRADE)
        await wire.head()
        with contextlib.suppress(ConnectionError):
            await wire.send(rng.choice(ENDING))
        await asyncio.wait_for(wire.closed(), seconds)
    return None if wire.status == 101 else f"no upgrade: {wire.status}"


async def reads_no_frames(
    address: tuple[str, int], rng: random.Random, seconds: float, tell: Callable[[str], None]
) -> str | None:
    """Asks for more than two kernels take for it, by calls or by pings."""
    calls = [raw_frame(1, json.dumps({"id": str(at), "function": "metadata"}).encode()) for at in range(1000)]
    tell("a WebSocket that is not read")
    async with Wire.open(address) as wire:
        await wire.send(UPGRADE)
        await wire.head()
        asked = b"".join(calls) if rng.random() < 0.5 else raw_frame(9, b"x" * 125) * 100_000
        try:
            async with asyncio.timeout(seconds):
                await wire.send(asked)
                while True:
                    await asyncio.sleep(0.5)
                    await wire.send(raw_frame(9, b""))  # tells a connection that is no more
        except ConnectionError:
            return None
        except TimeoutError:
            return "held for ever"
