"""An OpenAI-compatible server with known delays and token counts, and with every fault a client must survive.

Raw asyncio, so that nothing but its own schedule decides when a byte leaves: chunk i of an answer is sent at
`ttft + i * itl` seconds after the request was read, not after the chunk before.
"""

from __future__ import annotations

import asyncio
import contextlib
import json
import threading
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Any, Literal

__all__ = ["Behaviour", "Fault", "MockServer", "faster"]

Fault = Literal[
    "bad_json",  # a data line that is no JSON, after `fault_after` chunks
    "bad_utf8",  # bytes that are no UTF-8 inside a chunk's text
    "dies",  # the connection is cut in mid-stream
    "error_event",  # data: {"error": ...} in mid-stream
    "hangs",  # nothing more comes
    "no_done",  # a complete answer without data: [DONE]
    "no_finish",  # the stream ends well-formed but before the answer does
    "not_objects",  # data: 7
    "wrong_type",  # text/html
]


@dataclass(frozen=True)
class Behaviour:
    """`tokens` per answer in chunks of `per_chunk`. `refuses`: body fields answered with 400; `honours`: fields beyond
    OpenAI's it knows (others are ignored), with what each does to the behaviour; a value it does not like: 400.
    `vendor`: the `dfastllm` block. `status`: of POSTs, 200 or an HTTP error. `slots`: requests served at once, others
    wait."""

    ttft: float = 0.03
    itl: float = 0.005
    tokens: int = 12
    per_chunk: int = 1
    prompt_tokens: int = 9
    word: str = "tok "
    answer: Callable[[dict[str, Any]], str] | None = None  # the text of the whole answer, cut into `tokens` pieces
    usage: bool = True
    token_ids: bool = True
    tool_call: Mapping[str, Any] | None = None
    vendor: Mapping[str, Any] | None = None
    refuses: frozenset[str] = frozenset()
    honours: Mapping[str, Callable[[Any, Behaviour], Behaviour | None]] = field(default_factory=dict)
    tokenize: bool = False
    metrics: str | None = None
    fault: Fault | None = None
    fault_after: int = 3
    status: int = 200
    models: Sequence[Mapping[str, Any]] = ({"id": "mock", "object": "model", "owned_by": "mock", "kind": "ar"},)
    models_status: int = 200
    slots: int = 1000


class MockServer:
    """`with MockServer(Behaviour(...)) as server:` serves on `server.url` from a thread until the block ends.

    `bodies`: the request bodies received. `behaviour` may be replaced while it runs. `stop_after` requests it closes
    its port and cuts every connection, as a crash would.
    """

    def __init__(self, behaviour: Behaviour = Behaviour(), *, stop_after: int | None = None) -> None:
        self.behaviour = behaviour
        self.stop_after = stop_after
        self.bodies: list[dict[str, Any]] = []
        self.in_flight = 0
        self.most_in_flight = 0
        self.port = 0
        self._loop: asyncio.AbstractEventLoop | None = None
        self._server: asyncio.Server | None = None
        self._writers: set[asyncio.StreamWriter] = set()
        self._ready = threading.Event()
        self._thread = threading.Thread(target=lambda: asyncio.run(self._main()), daemon=True)

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> MockServer:
        self._thread.start()
        self._ready.wait(10)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        assert self._loop is not None
        with contextlib.suppress(RuntimeError):  # it has crashed as told
            self._loop.call_soon_threadsafe(self._end.set)
        self._thread.join(10)

    async def _main(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._end = asyncio.Event()
        self._slots = asyncio.Semaphore(self.behaviour.slots)
        self._server = await asyncio.start_server(self._connection, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        self._ready.set()
        await self._end.wait()
        self._server.close()
        for writer in list(self._writers):
            writer.transport.abort()
        await asyncio.sleep(0)

    async def _connection(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._writers.add(writer)
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
                method, path, _ = head[0].split(" ")
                headers = {k.lower(): v.strip() for k, _, v in (line.partition(":") for line in head[1:]) if v}
                raw = await reader.readexactly(int(headers.get("content-length", "0")))
                await self._answer(method, path, json.loads(raw) if raw else {}, writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            self._writers.discard(writer)
            writer.close()

    async def _answer(self, method: str, path: str, body: dict[str, Any], writer: asyncio.StreamWriter) -> None:
        b = self.behaviour
        if path == "/v1/models":
            await _send_json(writer, b.models_status, {"object": "list", "data": list(b.models)})
        elif path == "/metrics" and b.metrics is not None:
            await _send(writer, 200, "text/plain; version=0.0.4", b.metrics.encode())
        elif path == "/tokenize" and b.tokenize:
            words = str(body.get("prompt", "")).split()
            await _send_json(writer, 200, {"count": len(words), "tokens": list(range(len(words)))})
        elif method == "POST" and path in ("/v1/chat/completions", "/v1/completions"):
            self.bodies.append(body)
            if self.stop_after is not None and len(self.bodies) > self.stop_after:
                self._end.set()
                raise ConnectionResetError
            self.in_flight += 1
            self.most_in_flight = max(self.most_in_flight, self.in_flight)
            try:
                async with self._slots:
                    await self._complete(body, writer, chat="chat" in path)
            finally:
                self.in_flight -= 1
        else:
            await _send_json(writer, 404, {"error": {"message": f"no route {path}", "type": "invalid_request_error"}})

    async def _complete(self, body: dict[str, Any], writer: asyncio.StreamWriter, *, chat: bool) -> None:
        b = self.behaviour
        refused = next((name for name in body if name in b.refuses), None)
        for name, effect in b.honours.items():
            if name in body and refused is None:
                changed = effect(body[name], b)
                refused, b = (name, b) if changed is None else (None, changed)
        if b.status != 200 or refused is not None:
            message = f"unknown field {refused}" if refused else "told to fail"
            error = {"message": message, "type": "invalid_request_error", "param": refused}
            await _send_json(writer, b.status if refused is None else 400, {"error": error})
            return
        began = asyncio.get_running_loop().time()
        if not body.get("stream"):
            await asyncio.sleep(b.ttft + b.itl * (_chunks(b) - 1))
            await _send_json(writer, 200, _whole(b, body, chat))
            return
        kind = "text/html" if b.fault == "wrong_type" else "text/event-stream"
        writer.write(f"HTTP/1.1 200 OK\r\nContent-Type: {kind}\r\nTransfer-Encoding: chunked\r\n\r\n".encode())
        async for data in self._stream(b, body, began, chat):
            writer.write(f"{len(data):x}\r\n".encode() + data + b"\r\n")
            await writer.drain()
        writer.write(b"0\r\n\r\n")
        await writer.drain()

    async def _stream(self, b: Behaviour, body: dict[str, Any], began: float, chat: bool) -> AsyncIterator[bytes]:
        if chat:
            yield _event({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        pieces = _pieces(b, body)
        for i in range(_chunks(b)):
            due = began + b.ttft + i * b.itl
            await asyncio.sleep(max(0.0, due - asyncio.get_running_loop().time()))
            if b.fault is not None and i == b.fault_after:
                if b.fault == "dies":
                    raise ConnectionResetError
                if b.fault == "hangs":
                    await asyncio.sleep(3600)
                if b.fault == "no_finish":
                    return
                bad = {
                    "bad_json": b'data: {"choices": [{\n\n',
                    "bad_utf8": b'data: {"choices":[{"index":0,"delta":{"content":"\xff\xfe"}}]}\n\n',
                    "not_objects": b"data: 7\n\n",
                    "error_event": b'data: {"error": {"message": "out of memory", "code": 500}}\n\n',
                }.get(b.fault)
                if bad is not None:
                    yield bad
            part = pieces[i * b.per_chunk : (i + 1) * b.per_chunk]
            choice: dict[str, Any] = {"index": 0, "finish_reason": None}
            choice |= {"delta": {"content": "".join(part)}} if chat else {"text": "".join(part)}
            if b.tool_call is not None and chat:
                whole = {"index": 0, "id": "call_1", "type": "function", "function": dict(b.tool_call)}
                choice["delta"] = {"tool_calls": [whole]} if i == _chunks(b) - 1 else {"content": ""}
            if b.token_ids and body.get("return_token_ids"):
                first = i * b.per_chunk
                choice["token_ids"] = list(range(first, first + len(part)))
            yield _event({"choices": [choice]})
        last: dict[str, Any] = {"index": 0, "finish_reason": "stop", **({"delta": {}} if chat else {"text": ""})}
        yield _event({"choices": [last]})
        if b.usage and (body.get("stream_options") or {}).get("include_usage"):
            vendor = {"dfastllm": dict(b.vendor)} if b.vendor is not None else {}
            yield _event({"choices": [], "usage": _usage(b), **vendor})
        if b.fault != "no_done":
            yield b"data: [DONE]\n\n"


def _chunks(b: Behaviour) -> int:
    return -(-b.tokens // b.per_chunk)


def _pieces(b: Behaviour, body: dict[str, Any]) -> list[str]:
    """The answer's text in `tokens` pieces."""
    if b.answer is None:
        return [b.word] * b.tokens
    text = b.answer(body)
    size = max(1, -(-len(text) // b.tokens))
    cut = [text[i : i + size] for i in range(0, len(text), size)]
    return cut + [""] * (b.tokens - len(cut))


def _usage(b: Behaviour) -> dict[str, int]:
    total = b.prompt_tokens + b.tokens
    return {"prompt_tokens": b.prompt_tokens, "completion_tokens": b.tokens, "total_tokens": total}


def _whole(b: Behaviour, body: dict[str, Any], chat: bool) -> dict[str, Any]:
    text = "".join(_pieces(b, body))
    choice: dict[str, Any] = {"index": 0, "finish_reason": "stop"}
    choice |= {"message": {"role": "assistant", "content": text}} if chat else {"text": text}
    return {"object": "chat.completion", "model": "mock", "choices": [choice], "usage": _usage(b)}


def _event(data: Mapping[str, Any]) -> bytes:
    return f"data: {json.dumps({'id': 'mock', 'object': 'chat.completion.chunk', **data})}\n\n".encode()


async def _send(writer: asyncio.StreamWriter, status: int, kind: str, body: bytes) -> None:
    writer.write(
        f"HTTP/1.1 {status} X\r\nServer: mock\r\nContent-Type: {kind}\r\nContent-Length: {len(body)}\r\n\r\n".encode()
        + body
    )
    await writer.drain()


async def _send_json(writer: asyncio.StreamWriter, status: int, body: Mapping[str, Any]) -> None:
    await _send(writer, status, "application/json", json.dumps(body).encode())


def faster(factor: float) -> Callable[[Any, Behaviour], Behaviour | None]:
    """An `honours` entry: an object with `num_speculative_tokens` k makes an answer come in chunks of k + 1 tokens that
    take `factor` times as long as a chunk of one; method none changes nothing; anything else is refused."""

    def effect(value: Any, b: Behaviour) -> Behaviour | None:
        known = {"method", "num_speculative_tokens", "adaptive"}
        if not isinstance(value, Mapping) or not value.keys() <= known:
            return None
        if value.get("method") == "none":
            return b
        k = int(value.get("num_speculative_tokens", 5))
        drafts = -(-b.tokens // (k + 1))
        taken = b.tokens - drafts
        vendor = {"nfe": drafts, "tokens_per_forward": b.tokens / drafts, "exactness": "reference", "drafts": drafts}
        vendor |= {"draft_tokens": drafts * k, "accepted_tokens": taken, "accepted_per_position": [drafts] * k}
        return replace(b, per_chunk=k + 1, itl=b.itl * factor, vendor=vendor)

    return effect
