"""200 calls over 20 connections, others that vanish beside them: each answer is what the library gives it alone."""

from __future__ import annotations

import asyncio
import json
import random
from typing import Any

from websockets.asyncio.client import ClientConnection, connect

from tests.kit.live import Live
from tests.kit.served import random_engine
from tests.kit.sockets import checked, front
from tests.server.test_concurrent import Case, alone, cases
from tests.server.test_lifecycle import idle, until

CONNECTIONS = 20
CALLS = 200
VANISHING = 6
Answer = list[tuple[list[int], str, str]]


def params(case: Case) -> dict[str, Any]:
    asked = {"model": case.model, "prompt": case.prompt, "n": case.n, "stream": case.stream, **case.body}
    return {**asked, "return_token_ids": True}


def answer(frames: list[dict[str, Any]], case: Case) -> Answer:
    """(tokens, text, why it ended) of each choice."""
    last = frames[-1]
    assert last["status"] == "complete", last
    if not case.stream:
        assert len(frames) == 1
        return [(c["token_ids"], c["text"], c["finish_reason"]) for c in last["data"]["choices"]]
    parts = [frame["data"] for frame in frames[:-1]]
    out = []
    for choice in range(case.n):
        mine = [part for part in parts if part["choice"] == choice]
        ids = [token for part in mine for token in part.get("token_ids", [])]
        assert [part["is_final"] for part in mine] == [False] * (len(mine) - 1) + [True]
        out.append((ids, "".join(part["text"] for part in mine), mine[-1]["finish_reason"]))
    assert last["data"]["text"] == out[0][1]
    return out


async def connected(live: Live) -> ClientConnection:
    ws = await connect(live.url.replace("http", "ws", 1) + "/ws", compression=None, proxy=None)
    assert checked(await ws.recv())["status"] == "connected"
    return ws


async def ask(live: Live, wanted: list[tuple[int, Case]], got: dict[int, Answer]) -> None:
    """All calls of one connection at once."""
    ws = await connected(live)
    for number, case in wanted:
        await ws.send(json.dumps({"id": str(number), "function": "generate", "params": params(case)}))
    frames: dict[int, list[dict[str, Any]]] = {number: [] for number, _ in wanted}
    by_number = dict(wanted)
    while len(got.keys() & by_number.keys()) < len(wanted):
        frame = checked(await ws.recv())
        number = int(frame["id"])
        assert number not in got, "a frame after the last"
        frames[number].append(frame)
        if frame["status"] != "streaming":
            got[number] = answer(frames[number], by_number[number])
    await ws.close()


async def vanish(live: Live, wanted: list[Case], draw: random.Random) -> None:
    """Ask, read a few frames, and be gone, now politely and now not."""
    ws = await connected(live)
    for number, case in enumerate(wanted):
        await ws.send(json.dumps({"id": str(number), "function": "generate", "params": params(case)}))
    for _ in range(draw.randrange(4)):
        await ws.recv()
    if draw.random() < 0.5:
        ws.transport.abort()
    else:
        await ws.close()


async def all_of_it(live: Live, wanted: list[Case]) -> dict[int, Answer]:
    draw = random.Random(3)
    got: dict[int, Answer] = {}
    numbered = list(enumerate(wanted))
    asking = [ask(live, numbered[at::CONNECTIONS], got) for at in range(CONNECTIONS)]
    vanishing = [vanish(live, draw.sample(wanted, 4), draw) for _ in range(VANISHING)]
    await asyncio.gather(*asking, *vanishing)
    return got


def test_every_answer_is_the_one_it_is_alone(live: Live) -> None:
    different = cases(40)
    engines = {
        "canvas": random_engine("llada"),
        "causal": random_engine("llama", seed=1),
        "blocks": random_engine("sdar", seed=2),
    }
    solo = [alone(engines, case) for case in different]
    wanted = different * (CALLS // len(different))
    got = asyncio.run(all_of_it(live, wanted))
    assert len(got) == CALLS
    for number, case in enumerate(wanted):
        assert got[number] == solo[number % len(different)], case
    assert until(lambda: idle(live))
    assert until(lambda: not front(live).sessions)
