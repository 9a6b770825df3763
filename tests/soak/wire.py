"""A client of a few lines that can also misbehave: it hangs up, resets, dribbles, and reads or does not."""

from __future__ import annotations

import asyncio
import contextlib
import json
import socket
import struct
from collections.abc import AsyncIterator, Mapping
from dataclasses import dataclass
from typing import Any

__all__ = ["Broken", "Wire", "request"]


class Broken(Exception):
    """The answer ended before its end, or is not HTTP."""


def request(method: str, path: str, body: bytes | None = None, headers: Mapping[str, str] | None = None) -> bytes:
    """A whole request as it goes over the wire, one that ends its connection."""
    lines = [f"{method} {path} HTTP/1.1", "Host: localhost", "Connection: close"]
    if body is not None:
        lines += ["Content-Type: application/json", f"Content-Length: {len(body)}"]
    lines += [f"{name}: {value}" for name, value in (headers or {}).items()]
    return "\r\n".join([*lines, "", ""]).encode() + (body or b"")


@dataclass
class Wire:
    """One connection. status, headers: of the answer, after `head`."""

    reader: asyncio.StreamReader
    writer: asyncio.StreamWriter
    status: int = 0
    headers: Mapping[str, str] | None = None

    @classmethod
    @contextlib.asynccontextmanager
    async def open(cls, address: tuple[str, int]) -> AsyncIterator[Wire]:
        reader, writer = await asyncio.open_connection(*address)
        wire = cls(reader, writer)
        try:
            yield wire
        finally:
            writer.close()

    async def send(self, data: bytes) -> None:
        self.writer.write(data)
        await self.writer.drain()

    def end_writing(self) -> None:
        self.writer.write_eof()

    def reset(self) -> None:
        """Leave without a goodbye: the server's machine gets RST for what it sends."""
        found: socket.socket = self.writer.get_extra_info("socket")
        found.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.writer.transport.abort()

    async def head(self) -> int:
        """Reads status and headers, interim answers aside. Raises Broken."""
        while True:
            try:
                raw = await self.reader.readuntil(b"\r\n\r\n")
            except (asyncio.IncompleteReadError, ConnectionError) as error:
                raise Broken(f"no answer: {error!r:.200}") from error
            first, *rest = raw[:-4].decode("latin-1").split("\r\n")
            self.status = int(first.split()[1])
            self.headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in rest)}
            if self.status != 100:
                return self.status

    async def chunks(self) -> AsyncIterator[bytes]:
        """The body in the parts that it comes in. Raises Broken where it ends before its end."""
        assert self.headers is not None
        try:
            if self.headers.get("transfer-encoding") == "chunked":
                while size := int(await self.reader.readuntil(b"\r\n"), 16):
                    yield (await self.reader.readexactly(size + 2))[:-2]
                await self.reader.readexactly(2)
            else:
                yield await self.reader.readexactly(int(self.headers.get("content-length", 0)))
        except (asyncio.IncompleteReadError, ConnectionError, ValueError) as error:
            raise Broken(f"the answer breaks off: {error!r:.200}") from error

    async def body(self) -> bytes:
        return b"".join([part async for part in self.chunks()])

    async def answer(self) -> Any:
        """Head and JSON body."""
        await self.head()
        return json.loads(await self.body())

    async def events(self) -> AsyncIterator[Any]:
        """The JSON of each event of a stream, comments aside. Raises Broken where [DONE] does not come."""
        rest = b""
        async for part in self.chunks():
            *whole, rest = (rest + part).split(b"\n\n")
            for event in whole:
                if event == b"data: [DONE]":
                    return
                if event.startswith(b"data: "):
                    yield json.loads(event[6:])
        raise Broken("a stream without [DONE]")

    async def closed(self) -> bytes:
        """All that comes until the server ends the connection, in whatever way."""
        data = b""
        with contextlib.suppress(ConnectionError):
            while part := await self.reader.read(65536):
                data += part
        return data
