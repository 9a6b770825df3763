"""A teacher on a loopback socket that does to each question what a script says, attempt by attempt, and counts."""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

__all__ = ["MockTeacher", "Step", "completion", "fails", "says"]


@dataclass(frozen=True)
class Step:
    """What comes of one attempt. kind: answer: `body` with `status`; reset: the connection is cut; stall: nothing
    comes; half: a body that is cut in the middle."""

    kind: Literal["answer", "reset", "stall", "half"] = "answer"
    status: int = 200
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""


def completion(
    text: str | None,
    *,
    reason: str | None = "stop",
    calls: Sequence[tuple[str, str]] = (),
    logprobs: Sequence[Mapping[str, Any]] | None = None,
    usage: tuple[int, int] | None = (10, 5),
    **choice: Any,
) -> dict[str, Any]:
    """A chat completion as servers send it. calls: names and arguments."""
    message: dict[str, Any] = {"role": "assistant", "content": text}
    if calls:
        message["tool_calls"] = [
            {"id": f"c{at}", "type": "function", "function": {"name": name, "arguments": arguments}}
            for at, (name, arguments) in enumerate(calls)
        ]
    row = {"index": 0, "message": message, "finish_reason": reason, **choice}
    if logprobs is not None:
        row["logprobs"] = {"content": list(logprobs)}
    out: dict[str, Any] = {"id": "x", "object": "chat.completion", "model": "mock", "choices": [row]}
    if usage is not None:
        out["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return out


def says(text: str | None, **rest: Any) -> Step:
    return Step(body=json.dumps(completion(text, **rest)).encode())


def fails(status: int, message: str = "told to fail", *, code: str = "x", **headers: str) -> Step:
    error = {"error": {"message": message, "code": code}}
    named = {name.replace("_", "-"): value for name, value in headers.items()}
    return Step(status=status, headers=named, body=json.dumps(error).encode())


Script = Callable[[str, int], Step]


class MockTeacher:
    """`with MockTeacher(script) as teacher:` serves on `teacher.url` until the block ends. script: (the last message's
    content, number of the attempt from 0) to a step.

    asked: attempts by question. answered: whole answers of status 200 by question. bodies, authorisations: of each
    request. hold: questions that are received and not answered until `release` is set.
    """

    def __init__(self, script: Script, hold: Callable[[str], bool] = lambda _: False) -> None:
        self.script = script
        self.hold = hold
        self.release = threading.Event()
        self.asked: Counter[str] = Counter()
        self.answered: Counter[str] = Counter()
        self.bodies: list[dict[str, Any]] = []
        self.authorisations: set[str | None] = set()
        self.in_flight = self.most_in_flight = 0
        self.port = 0
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}/v1"

    def __enter__(self) -> MockTeacher:
        self._thread.start()
        assert self._ready.wait(10)
        return self

    def __exit__(self, *_: object) -> None:
        self.release.set()
        self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _main(self) -> None:
        self._loop, self._end = asyncio.get_running_loop(), asyncio.Event()
        self._writers: set[asyncio.StreamWriter] = set()
        server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError, asyncio.CancelledError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:]) if v}
                raw = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(head[0].split(" ")[1], headers, raw, reader, writer)
        self._writers.discard(writer)
        writer.close()

    async def _answer(
        self,
        path: str,
        headers: Mapping[str, str],
        raw: bytes,
        reader: asyncio.StreamReader,
        writer: asyncio.StreamWriter,
    ) -> None:
        self.authorisations.add(headers.get("authorization"))
        if path == "/v1/models":
            await _send(writer, Step(body=b'{"data": [{"id": "mock"}]}'))
            return
        body = json.loads(raw)
        self.bodies.append(body)
        question = str(body["messages"][-1]["content"])
        step = self.script(question, self.asked[question])
        self.asked[question] += 1
        self.in_flight += 1
        self.most_in_flight = max(self.most_in_flight, self.in_flight)
        try:
            while self.hold(question) and not self.release.is_set():
                await asyncio.sleep(0.005)
            await asyncio.sleep(0)
            if step.kind == "reset" or reader.at_eof():  # or the client is gone
                raise ConnectionResetError
            if step.kind == "stall":
                await self._end.wait()
                return
            if step.kind == "answer" and step.status == 200:
                self.answered[question] += 1
            await _send(writer, step)
        finally:
            self.in_flight -= 1
        if step.kind == "half":
            raise ConnectionResetError


async def _send(writer: asyncio.StreamWriter, step: Step) -> None:
    said = {"Content-Type": "application/json", "Content-Length": str(len(step.body)), **step.headers}
    head = f"HTTP/1.1 {step.status} X\r\n" + "".join(f"{k}: {v}\r\n" for k, v in said.items()) + "\r\n"
    writer.write(head.encode() + (step.body[: len(step.body) // 2] if step.kind == "half" else step.body))
    await writer.drain()
