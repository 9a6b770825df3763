"""What no client should do, and what the server must do about each: an answer of these statuses, or an end in time."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable, Callable, Mapping

from tests.kit.bombs import BOMBS
from tests.soak.deck import MODELS
from tests.soak.sockets import bad_frames, reads_no_frames
from tests.soak.wire import Wire, request

__all__ = ["ATTACKS", "DEADLINE", "Address"]

Address = tuple[str, int]
Tell = Callable[[str], None]
DEADLINE = 2  # s: the server's deadlines in a soak
SLACK = 12.0  # s more that a loaded machine may take to end what is overdue
LARGEST = 8 << 20  # bytes: the server's limit of a body

POST = b"POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
MALFORMED = (
    b"nonsense\r\n\r\n",
    b"GET /health HTTP/1.1\r\n\r\n",
    b"GET /health HTTP/9.9\r\nHost: localhost\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: evil.example\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: b\0\r\n\r\n",
    b"GET /health HTTP/1.1\r\nHost: localhost\r\nA: " + b"x" * 100_000 + b"\r\n\r\n",
    b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03\n\n",
    POST + b"Content-Length: 5\r\nTransfer-Encoding: chunked\r\n\r\n0\r\n\r\n",
    POST + b"Content-Length: 5\r\nContent-Length: 6\r\n\r\nhello!",
    POST + b"Transfer-Encoding: chunked\r\n\r\nxyz\r\n",
)
BODIES = (
    b"",
    b"{",
    b"[]",
    b"null",
    b'"text"',
    b"\xff\xfe\x00",
    b'{"model":"demo-ar","messages":5}',
    b'{"model":"none","messages":[{"role":"user","content":"x"}]}',
    b'{"model":"demo-ar","messages":[{"role":"user","content":"x"}],"max_tokens":-1}',
    b'{"model":"demo-ar","messages":[{"role":"user","content":"x"}],"temperature":1e999}',
    b'{"model":"demo-ar","messages":[{"role":"user","content":"\\ud800"}],"x":1}',
    b'{"\\ud800":1}',
)


def _say(found: bytes, wanted: str) -> str:
    return f"got {found[:80]!r}, wanted {wanted}"


def _status(found: bytes) -> int:
    first = found.split(b"\r\n", 1)[0].split()
    return int(first[1]) if len(first) > 1 and first[1].isdigit() else 0


async def malformed(address: Address, rng: random.Random, _: int, __: Tell) -> str | None:
    """No HTTP, or HTTP that can be read in two ways: refused, and the connection ended."""
    async with Wire.open(address) as wire:
        await wire.send(rng.choice(MALFORMED))
        found = await asyncio.wait_for(wire.closed(), DEADLINE + SLACK)
    return None if _status(found) in (400, 421, 431, 501, 505) else _say(found, "a refusal")


async def wrong_body(address: Address, rng: random.Random, _: int, __: Tell) -> str | None:
    async with Wire.open(address) as wire:
        await wire.send(request("POST", "/v1/chat/completions", rng.choice(BODIES)))
        found = await asyncio.wait_for(wire.closed(), DEADLINE + SLACK)
    return None if _status(found) in (400, 404, 413) else _say(found, "a refusal")


async def oversized(address: Address, rng: random.Random, _: int, tell: Tell) -> str | None:
    """More than the server takes: declared, or only sent."""
    declared = rng.random() < 0.5
    tell("an oversized body")
    async with Wire.open(address) as wire:
        framing = b"Content-Length: %d\r\n\r\n" % (10 * LARGEST) if declared else b"Transfer-Encoding: chunked\r\n\r\n"
        with contextlib.suppress(ConnectionError):
            await wire.send(POST + framing)
            for _ in range(2 if declared else LARGEST // 2**20 + 2):
                await wire.send(b"100000\r\n" + b" " * 2**20 + b"\r\n")
        found = await asyncio.wait_for(wire.closed(), DEADLINE + SLACK)
    return None if _status(found) == 413 else _say(found, "413")


async def bomb(address: Address, rng: random.Random, size: int, tell: Tell) -> str | None:
    """A body that costs the server more than its sender."""
    chosen = rng.choice(BOMBS)
    tell(f"the bomb '{chosen.name}'")
    body = await asyncio.to_thread(chosen.body, size, rng.choice(MODELS))  # it takes a while
    async with Wire.open(address) as wire:
        with contextlib.suppress(ConnectionError):
            await wire.send(request("POST", chosen.path, body))
        found = await asyncio.wait_for(wire.closed(), 30 + SLACK)
    good = _status(found) in chosen.statuses or (size < 1 << 20 and _status(found) == 200)
    return None if good else f"{chosen.name}: {_say(found, str(chosen.statuses))}"


async def slow(address: Address, rng: random.Random, _: int, __: Tell) -> str | None:
    """Half a head, half a body, or nothing, and then a byte now and then."""
    begun = rng.choice((b"", b"GET /hea", POST, POST + b"Content-Length: 900\r\n\r\n{"))
    began = asyncio.get_running_loop().time()
    async with Wire.open(address) as wire:
        with contextlib.suppress(ConnectionError):
            await wire.send(begun)
            ended = asyncio.ensure_future(wire.closed())
            while not ended.done() and asyncio.get_running_loop().time() - began < DEADLINE + SLACK:
                await asyncio.wait([ended], timeout=0.4)
                if begun and not ended.done():
                    await wire.send(b" " if begun.endswith(b"{") else b"x")
            if not ended.done():
                ended.cancel()
                return "held for ever"
            found = ended.result()
            return None if (_status(found) == 408 if begun else found == b"") else _say(found, "408")
    return None  # ended while it was written to


async def reads_nothing(address: Address, rng: random.Random, _: int, tell: Tell) -> str | None:
    """Asks for more than two kernels take for it."""
    tell("a slow reader")
    async with Wire.open(address) as wire:
        with contextlib.suppress(ConnectionError):
            await wire.send(b"GET /openapi.json HTTP/1.1\r\nHost: localhost\r\n\r\n" * 400)
        for _ in range(int((DEADLINE + SLACK) * 2)):
            await asyncio.sleep(0.5)
            try:
                await wire.send(b"G")  # tells a connection that is no more
            except ConnectionError:
                return None
    return "held for ever"


async def frames(address: Address, rng: random.Random, _: int, __: Tell) -> str | None:
    return await bad_frames(address, rng, DEADLINE + SLACK)


async def unread_frames(address: Address, rng: random.Random, _: int, tell: Tell) -> str | None:
    return await reads_no_frames(address, rng, DEADLINE + SLACK, tell)


# What an attack is given: the server, its draws, the bytes of a large body, and whom it tells what it does.
Attack = Callable[[Address, random.Random, int, Tell], Awaitable[str | None]]
# name -> (what is done, seconds between two of them)
ATTACKS: Mapping[str, tuple[Attack, float]] = {
    "malformed requests": (malformed, 0.3),
    "wrong bodies": (wrong_body, 0.3),
    "oversized bodies": (oversized, 2.0),
    "bombs": (bomb, 1.5),
    "slow senders": (slow, 0.1),
    "slow readers": (reads_nothing, 5.0),
    "bad frames": (frames, 1.0),
    "unread frames": (unread_frames, 5.0),
}
