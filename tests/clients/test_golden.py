"""Golden transcripts: the server still says what it said, and the Python client still does."""

from __future__ import annotations

import asyncio

import pytest
from clients.golden.scenarios import SCENARIOS, played
from clients.golden.server import Platform
from clients.golden.transcripts import Line, Transcript, loaded, ordered, settled

from tests.kit.replay import replaying_socket, replaying_transport, to_server

TRANSCRIPTS = loaded()
each = pytest.mark.parametrize("transcript", TRANSCRIPTS, ids=lambda one: one.scenario.name)


def test_every_scenario_has_its_transcript() -> None:
    recorded = {one.scenario.name: one.scenario for one in TRANSCRIPTS}
    assert recorded == {one.name: one for one in SCENARIOS}, "python -m clients.golden.record"


@each
def test_the_server_says_what_it_said(golden: Platform, transcript: Transcript) -> None:
    said = asyncio.run(to_server(transcript, golden))
    for got, wanted in zip(said, transcript.lines, strict=False):
        assert got == wanted
    assert len(said) == len(transcript.lines)


@each
def test_the_client_says_and_understands_it(transcript: Transcript) -> None:
    assert asyncio.run(replayed(transcript)) == transcript.outcomes


async def replayed(transcript: Transcript) -> object:
    if transcript.scenario.transport == "http":
        return await played(transcript.scenario, "http://replay", None, replaying_transport(transcript.lines))
    async with replaying_socket(transcript.lines) as (url, wrong):
        outcomes = await asyncio.wait_for(played(transcript.scenario, url, transcript.scenario.api_key), 20)
    assert wrong == []
    return outcomes


def test_a_client_that_says_something_else_is_noticed() -> None:
    transcript = next(one for one in TRANSCRIPTS if one.scenario.name == "http-generate")
    changed = [
        {"request": {**line["request"], "path": "/v1/other"}} if "request" in line else line
        for line in transcript.lines
    ]
    with pytest.raises(AssertionError, match="the transcript has"):
        asyncio.run(replayed(Transcript(transcript.scenario, transcript.outcomes, changed)))


def test_what_differs_at_every_run_is_settled() -> None:
    a, b = "cmpl-0123456789abcdef0", "cmpl-fedcba9876543210f"
    lines: list[Line] = [
        {"server": {"id": "c-" + "a" * 32, "created": 99, "data": {"id": a, "text": f"of {a}"}}},
        {"server": {"id": "c-" + "b" * 32, "data": {"id": b, "first_token_seconds": None, "total_seconds": 3.0}}},
        {"server": {"logprobs": {"tokens": ["a"], "token_logprobs": [-1.25], "top_logprobs": [{"a": -1.25}]}}},
        {"response": {"error": {"message": "In 59.2 s again."}, "text": "in 3 s"}},
    ]
    assert settled(lines) == [
        {"server": {"id": "c-0", "created": 0, "data": {"id": "cmpl-0", "text": "of cmpl-0"}}},
        {"server": {"id": "c-1", "data": {"id": "cmpl-1", "first_token_seconds": None, "total_seconds": 0.75}}},
        {"server": {"logprobs": {"tokens": ["a"], "token_logprobs": [-0.5], "top_logprobs": [{"a": -0.5}]}}},
        {"response": {"error": {"message": "In 30 s again."}, "text": "in 3 s"}},
    ]


def test_a_cancelled_call_keeps_one_piece_and_calls_at_once_are_put_together() -> None:
    def said(id: str, status: str, number: int = 0) -> Line:
        return {"server": {"id": id, "status": status, "data": number}}

    a, b = {"client": {"id": "a"}}, {"client": {"id": "b"}}
    pieces = [said("a", "streaming", 0), said("a", "streaming", 1), said("a", "cancelled")]
    assert ordered([a, *pieces], at_once=False) == [a, pieces[0], pieces[2]]
    mixed = [a, said("a", "streaming"), b, said("b", "complete"), said("a", "complete")]
    assert ordered(mixed, at_once=True) == [a, b, mixed[1], mixed[4], mixed[3]]
