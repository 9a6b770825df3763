"""Golden transcripts, replayed: to a real server as its client, and to a client as its server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import asynccontextmanager
from typing import Any

import httpx
from clients.golden.record import exchange_of
from clients.golden.server import Platform
from clients.golden.transcripts import Line, Transcript, ordered, settled
from websockets.asyncio.client import connect
from websockets.asyncio.server import ServerConnection, serve
from websockets.exceptions import ConnectionClosed

__all__ = ["replaying_socket", "replaying_transport", "to_server"]


async def to_server(transcript: Transcript, platform: Platform) -> list[Line]:
    """Say to the server what the client said, and give back the whole exchange as it went this time."""
    url = platform.live.url
    if transcript.scenario.transport == "http":
        return settled(await _requests(transcript, platform))
    lines = await _frames(transcript.lines, f"{url.replace('http', 'ws', 1)}/ws", platform.keys)
    return settled(ordered(lines, transcript.scenario.at_once))


async def _requests(transcript: Transcript, platform: Platform) -> list[Line]:
    key = platform.keys.get(transcript.scenario.api_key or "", transcript.scenario.api_key)
    lines: list[Line] = []
    async with httpx.AsyncClient(base_url=platform.live.url, headers={"Authorization": f"Bearer {key}"}) as client:
        for line in transcript.lines:
            if "request" in line:
                asked = line["request"]
                answer = await client.request(asked["method"], asked["path"], json=asked["body"])
                lines += [line, {"response": exchange_of(answer.status_code, answer.headers, answer.content)}]
    return lines


def _key(line: Line) -> tuple[Any, Any]:
    frame = line.get("server", {})
    return frame.get("id"), frame.get("status", frame.get("type"))


async def _frames(expected: Sequence[Line], url: str, keys: Mapping[str, str]) -> list[Line]:
    """Each client's frame is sent when as much has come as had come in the transcript. Reads on until the last call has
    ended, or the server closes."""
    lines: list[Line] = []

    async def until(wanted: tuple[Any, Any], count: int) -> None:
        while sum(_key(line) == wanted for line in lines) < count:
            lines.append({"server": json.loads(await asyncio.wait_for(socket.recv(), 20))})

    async with connect(url) as socket:
        for number, line in enumerate(expected):
            if "client" in line:
                await socket.send(json.dumps(_keyed(line["client"], keys)))
                lines.append(line)
            else:
                await until(_key(line), sum(_key(line) == _key(before) for before in expected[: number + 1]))
    return lines


def _keyed(frame: Any, keys: Mapping[str, str]) -> Any:
    named = frame.get("api_key")
    return {**frame, "api_key": keys.get(named, named)} if named else frame


def replaying_transport(lines: Sequence[Line]) -> httpx.MockTransport:
    """A server that answers as it did, as long as it is asked the same in the same order."""
    pairs = [(lines[number]["request"], lines[number + 1]["response"]) for number in range(0, len(lines), 2)]

    def answer(request: httpx.Request) -> httpx.Response:
        asked, said = pairs.pop(0)
        body = json.loads(request.content or b"null")
        got = {"method": request.method, "path": request.url.raw_path.decode(), "body": body}
        assert got == asked, f"asked {got}, the transcript has {asked}"
        if "events" in said:
            events = [event if isinstance(event, str) else json.dumps(event) for event in said["events"]]
            content = "".join(f"data: {event}\n\n" for event in events)
        else:
            content = json.dumps(said["body"])
        return httpx.Response(said["status"], headers=said["headers"], content=content)

    return httpx.MockTransport(answer)


@asynccontextmanager
async def replaying_socket(lines: Sequence[Line]) -> AsyncIterator[tuple[str, list[str]]]:
    """A WebSocket server that says what it said, when it is told what it was told. Its url, and what went wrong."""
    wrong: list[str] = []

    async def talk(socket: ServerConnection) -> None:
        names: dict[str, str] = {}  # the client's ids by the transcript's
        try:
            for line in lines:
                if "server" in line:
                    await socket.send(json.dumps(_named(line["server"], names)))
                    continue
                wanted, got = line["client"], json.loads(await socket.recv())
                if "id" in wanted:
                    names[wanted["id"]] = got["id"]
                if got != _named(wanted, names):
                    wrong.append(f"told {got}, the transcript has {_named(wanted, names)}")
            await socket.wait_closed() if "client" in lines[-1] or _key(lines[-1])[1] != "auth_failed" else None
        except ConnectionClosed:
            wrong.append("the client left early")

    async with serve(talk, "127.0.0.1", 0) as server:
        yield f"ws://127.0.0.1:{next(iter(server.sockets)).getsockname()[1]}/ws", wrong


def _named(frame: Any, names: dict[str, str]) -> Any:
    """A frame of the transcript with the ids of this run."""
    if isinstance(frame, dict):
        return {key: names.get(value, value) if key == "id" else _named(value, names) for key, value in frame.items()}
    return frame
