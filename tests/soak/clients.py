"""Clients that ask the questions of a deck in every way that clients do, and hold each answer against its reference."""

from __future__ import annotations

import asyncio
import json
import random
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from websockets.exceptions import ConnectionClosed

from tests.soak.attacks import Address
from tests.soak.deck import Choice, Question, assembled, outcome
from tests.soak.sockets import choices, open_socket, send_call
from tests.soak.wire import Broken, Wire, request

__all__ = ["WAYS", "Clients", "Found", "alone"]

# how a question is asked -> its share
WAYS: Mapping[str, float] = {
    "whole": 0.4,
    "stream": 0.28,
    "half-closed": 0.05,
    "hang up": 0.09,
    "leave": 0.05,
    "reset": 0.05,
    "cancel": 0.08,
    "socket": 0.16,
    "leave socket": 0.06,
    "cancel on socket": 0.06,
}
SOCKETS = ("socket", "leave socket", "cancel on socket")
AT_ONCE = 4  # calls of one socket
REFUSED = (429, 503)  # for now: asked again later
LONGEST = 180.0  # s for one answer; longer is lost


@dataclass
class Found:
    """What was seen. asked: by way; refused: for now. differ, lost, failed: sentences, of the first of each kind."""

    asked: Counter[str] = field(default_factory=Counter)
    compared: int = 0
    refused: int = 0
    cancelled: int = 0
    differ: list[str] = field(default_factory=list)
    lost: list[str] = field(default_factory=list)
    failed: list[str] = field(default_factory=list)


async def alone(address: Address, question: Question) -> list[Choice]:
    """What a question is answered with now."""
    async with Wire.open(address) as wire:
        await wire.send(request("POST", question.path, question.data()))
        answer = await wire.answer()
    if wire.status != 200:
        raise AssertionError(f"{wire.status} for {question}: {answer}")
    return outcome(answer)


class Clients:
    """Ask until they are stopped. Each takes a question, a way, and what comes of it into `found`."""

    def __init__(
        self, address: Address, questions: list[Question], references: list[list[Choice]], rng: random.Random
    ) -> None:
        self.address = address
        self.questions = questions
        self.references = references
        self.rng = rng
        self.found = Found()
        self.over = False

    async def run(self, name: str) -> None:
        """One client, until `over`."""
        turn = 0
        while not self.over:
            turn += 1
            way = self.rng.choices(list(WAYS), list(WAYS.values()))[0]
            index = self.rng.randrange(len(self.questions))
            self.found.asked[way] += 1
            try:
                async with asyncio.timeout(LONGEST):
                    if way in SOCKETS:
                        await self._over_socket(way, index)
                    else:
                        async with Wire.open(self.address) as wire:
                            await self._ask(wire, way, index, f"{name}-{turn}")
            except TimeoutError:
                self.found.lost.append(f"{way}: no end within {LONGEST:g} s: {self.questions[index]}")
            except (Broken, ConnectionError, ConnectionClosed) as error:
                self.found.lost.append(f"{way}: {error}: {self.questions[index]}")

    async def _ask(self, wire: Wire, way: str, index: int, name: str) -> None:
        question = self.questions[index]
        streams = way in ("stream", "hang up") or (way in ("cancel", "half-closed") and self.rng.random() < 0.7)
        data = question.data(**({"stream": True} if streams else {}))
        await wire.send(request("POST", question.path, data, {"X-Request-ID": name}))
        if way in ("leave", "reset"):
            await asyncio.sleep(self.rng.random() * 0.3)
            if way == "reset":
                wire.reset()
            return
        if way == "half-closed":
            wire.end_writing()
        if way == "cancel" and not streams:
            await self._cancel(name, asyncio.ensure_future(asyncio.sleep(self.rng.random() * 0.3)))
        status = await wire.head()
        if status != 200:
            self._not_answered(way, status, (await wire.body())[:200])
        elif streams:
            await self._read(wire, way, index, name)
        else:
            self._compare(way, index, outcome(json.loads(await wire.body())))

    async def _read(self, wire: Wire, way: str, index: int, name: str) -> None:
        parts = []
        most = self.rng.randrange(1, 12)
        async for part in wire.events():
            parts.append(part)
            if way == "hang up" and len(parts) == most:
                return
            if way == "cancel" and len(parts) == most:
                await self._cancel(name)
        error = next((part["error"] for part in parts if "error" in part), None)
        if error is None:
            self._compare(way, index, assembled(parts))
        else:
            self._not_answered(way, {"cancelled": 499}.get(error["code"], 500), str(error).encode())

    async def _over_socket(self, way: str, index: int) -> None:
        """Several questions at once on one connection, each whole or as a stream."""
        asked = {str(at): (index + at * at) % len(self.questions) for at in range(self.rng.randint(1, AT_ONCE))}
        async with open_socket(self.address) as ws:
            for id, number in asked.items():
                await send_call(ws, id, self.questions[number], stream=self.rng.random() < 0.5)
            if way != "socket":
                await asyncio.sleep(self.rng.random() * 0.3)
            if way == "leave socket":
                if self.rng.random() < 0.5:
                    ws.transport.abort()
                return
            if way == "cancel on socket":
                await ws.send(json.dumps({"id": "stop", "function": "cancel", "params": {"id": "0"}}))
            frames: dict[str, list[Any]] = {}
            open_calls = set(asked) | ({"stop"} if way == "cancel on socket" else set())
            while open_calls:
                frame = json.loads(await ws.recv())
                if frame["id"] not in open_calls:
                    raise Broken(f"a frame of no call: {frame!r:.200}")
                frames.setdefault(frame["id"], []).append(frame)
                if frame["status"] != "streaming":
                    open_calls.remove(frame["id"])
        for id, number in asked.items():
            self._told(way, number, frames[id])

    def _told(self, way: str, number: int, frames: list[Any]) -> None:
        last = frames[-1]
        if last["status"] == "complete":
            self._compare(way, number, choices(frames))
        elif last["status"] == "cancelled" and way == "cancel on socket":
            self.found.cancelled += 1
        else:
            error = last.get("error", {})
            self._not_answered(way, error.get("details", {}).get("status", 0), str(last).encode())

    async def _cancel(self, name: str, after: asyncio.Future[None] | None = None) -> None:
        if after is not None:
            await after
        async with Wire.open(self.address) as other:
            await other.send(request("DELETE", f"/v1/requests/{name}"))
            await other.answer()
        if other.status not in (200, 404):
            self.found.failed.append(f"DELETE: {other.status}")

    def _not_answered(self, way: str, status: int, said: bytes) -> None:
        if status in REFUSED:
            self.found.refused += 1
        elif status == 499 and way == "cancel":
            self.found.cancelled += 1
        else:
            self.found.failed.append(f"{way}: {status}: {said!r}")

    def _compare(self, way: str, index: int, got: list[Choice]) -> None:
        self.found.compared += 1
        wanted = self.references[index]
        if got != wanted:
            self.found.differ.append(f"{way}: {self.questions[index]}\n  alone: {wanted}\n  here:  {got}")
