"""The client against a server whose delays, tokens and faults are known."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from typing import Any

import pytest

from dfastllm.bench.suite.client import Answer, Call, Client, Features, as_prompt, error_message
from dfastllm.bench.suite.counting import Counters, TokenCounter
from dfastllm.bench.suite.watch import Watch
from tests.kit.mock_server import Behaviour, Fault, MockServer

HELLO = Call(({"role": "user", "content": "Hello?"},))
SLACK = 0.04  # s that a busy machine may add to a chunk


def ask(behaviour: Behaviour, call: Call = HELLO, **options: Any) -> Answer:
    with MockServer(behaviour) as server:

        async def one() -> Answer:
            client = Client(server.url, "mock", **options)
            try:
                await client.http.get(f"{server.url}/v1/models")  # connect
                return await client.ask(call)
            finally:
                await client.aclose()

        return asyncio.run(one())


def run(behaviour: Behaviour, work: Callable[[Client], Any]) -> Any:
    with MockServer(behaviour) as server:

        async def inside() -> Any:
            client = Client(server.url, "mock")
            try:
                return await work(client)
            finally:
                await client.aclose()

        return asyncio.run(inside())


def test_times_are_those_of_the_server() -> None:
    answer = ask(Behaviour(ttft=0.1, itl=0.02, tokens=10))
    assert answer.ok
    assert answer.first is not None
    assert 0.1 <= answer.first < 0.1 + SLACK
    assert answer.end is not None
    assert 0.1 + 9 * 0.02 <= answer.end < 0.1 + 9 * 0.02 + SLACK
    assert [chunk.at for chunk in answer.chunks] == pytest.approx([0.1 + 0.02 * i for i in range(10)], abs=SLACK)
    assert answer.tpot == pytest.approx(0.02, rel=0.15)


def test_tokens_are_the_usage_and_never_the_chunks() -> None:
    """Three chunks of four tokens: 12 tokens, gaps between chunks three times, tpot over eleven tokens."""
    answer = ask(Behaviour(ttft=0.05, itl=0.04, tokens=12, per_chunk=4))
    assert (answer.completion_tokens, answer.prompt_tokens, answer.tokens_source) == (12, 9, "usage")
    assert [chunk.tokens for chunk in answer.chunks] == [4, 4, 4]
    assert answer.token_ids == list(range(12))
    assert answer.tpot == pytest.approx(0.08 / 11, rel=0.3)


def test_a_role_without_content_is_no_first_token() -> None:
    """The server sends the role at once and the first token after ttft."""
    answer = ask(Behaviour(ttft=0.2, tokens=2))
    assert answer.first is not None
    assert answer.first >= 0.2


def test_without_usage_the_tokens_are_unknown_until_counted() -> None:
    answer = ask(Behaviour(usage=False, token_ids=False))
    assert answer.ok
    assert (answer.completion_tokens, answer.tokens_source, answer.tpot) == (None, "none", None)
    assert [chunk.tokens for chunk in answer.chunks] == [None] * 12


@pytest.mark.parametrize(("tokenize", "source", "tokens"), [(True, "tokenize", 12), (False, "estimate", 12)])
def test_tokens_are_counted_afterwards(tokenize: bool, source: str, tokens: int) -> None:
    async def work(client: Client) -> Answer:
        answer = await client.ask(HELLO)
        await TokenCounter(client).fill([answer])
        return answer

    answer = run(Behaviour(usage=False, tokenize=tokenize), work)  # 12 times "tok ": 12 words, 48 characters
    assert (answer.completion_tokens, answer.tokens_source) == (tokens, source)


def test_vendor_figures_are_read() -> None:
    answer = ask(Behaviour(vendor={"nfe": 4, "exactness": "reference", "drafts": 3}))
    assert answer.vendor == {"nfe": 4, "exactness": "reference", "drafts": 3}


def test_a_tool_call_is_timed_and_graded() -> None:
    call = {"name": "get_weather", "arguments": '{"city": "Oslo"}'}
    answer = ask(Behaviour(tool_call=call, tokens=4))
    assert answer.graded == '<tool_call>{"name": "get_weather", "arguments": {"city": "Oslo"}}</tool_call>'
    assert answer.call_at == answer.last


@pytest.mark.parametrize(
    ("fault", "error", "words"),
    [
        ("bad_json", "malformed", "no JSON object"),
        ("not_objects", "malformed", "no JSON object"),
        ("dies", "disconnected", ""),
        ("error_event", "server_error", "out of memory"),
        ("no_finish", "truncated", "no finish_reason"),
        ("wrong_type", "not_sse", "text/html"),
        ("hangs", "timeout", "0.5 s"),
    ],
)
def test_faults_are_answers(fault: Fault, error: str, words: str) -> None:
    answer = ask(Behaviour(fault=fault), timeout=0.5)
    assert answer.error == error
    assert answer.message is not None
    assert words in answer.message
    assert answer.e2e is None
    assert answer.end is not None


def test_an_answer_without_done_is_whole() -> None:
    answer = ask(Behaviour(fault="no_done"))
    assert answer.ok
    assert answer.completion_tokens == 12


def test_bytes_that_are_no_utf8_do_not_end_the_measuring() -> None:
    answer = ask(Behaviour(fault="bad_utf8"))
    assert answer.ok
    assert "�" in answer.text


@pytest.mark.parametrize(
    ("status", "error"), [(400, "refused"), (404, "refused"), (429, "http_429"), (500, "http_500")]
)
def test_http_errors_carry_the_servers_words(status: int, error: str) -> None:
    answer = ask(Behaviour(status=status))
    assert (answer.error, answer.message) == (error, "told to fail")


def test_nobody_there() -> None:
    with MockServer() as server:
        url = server.url

    async def work() -> Answer:
        client = Client(url, "mock")
        try:
            return await client.ask(HELLO)
        finally:
            await client.aclose()

    answer = asyncio.run(work())
    assert answer.error == "connect"


@pytest.mark.parametrize(
    "chunk",
    [
        '{"choices": 7}',
        '{"choices": [7]}',
        '{"choices": [{"delta": {"tool_calls": 3}}]}',
        '{"usage": {"completion_tokens": "many"}}',
        '{"usage": [1]}',
        '{"choices": [{"delta": "x"}]}',
    ],
)
def test_events_of_another_form_are_malformed(chunk: str) -> None:
    async def work(client: Client) -> Answer:
        answer = Answer(0.0)
        client._absorb(chunk, 0.1, answer)
        return answer

    answer = run(Behaviour(), work)
    assert answer.error == "malformed"


def test_options_win_and_api_key_is_sent() -> None:
    with MockServer(Behaviour(tokens=1)) as server:

        async def work() -> None:
            client = Client(server.url, "mock", features=Features(include_usage=False, token_ids=False))
            await client.ask(Call(HELLO.messages, max_tokens=7, options={"max_tokens": 9, "cache": "dual"}))
            client.features = Features(api="completions")
            await client.ask(HELLO)
            await client.aclose()

        asyncio.run(work())
        chat, completion = server.bodies
    assert (chat["max_tokens"], chat["cache"]) == (9, "dual")
    assert "stream_options" not in chat
    assert completion["prompt"] == "Hello?\n\n"
    assert "messages" not in completion


def exposition(drafts: int, tokens: int, accepted: int, positions: tuple[int, ...]) -> str:
    counts = {"num_drafts": drafts, "num_draft_tokens": tokens, "num_accepted_tokens": accepted}
    lines = []
    for name, value in counts.items():
        full = f"vllm:spec_decode_{name}_total"
        lines += [f"# TYPE {full} counter", f'{full}{{model_name="mock"}} {value}', f'{full}{{model_name="x"}} 900']
    full = "vllm:spec_decode_num_accepted_tokens_per_pos_total"
    lines += [f"# TYPE {full} counter"]
    lines += [f'{full}{{model_name="mock",position="{i}"}} {value}' for i, value in enumerate(positions)]
    return "\n".join(lines) + "\n"


def test_counters_are_differences() -> None:
    with MockServer(Behaviour(metrics=exposition(5, 15, 6, (4, 2)))) as server:

        async def work() -> Any:
            client = Client(server.url, "mock")
            counters = Counters(client)
            await counters.mark()
            server.behaviour = Behaviour(metrics=exposition(15, 45, 21, (13, 8)))
            found = await counters.since()
            await client.aclose()
            return found

        found = asyncio.run(work())
    assert (found.num_drafts, found.num_draft_tokens, found.num_accepted_tokens) == (10, 30, 15)
    assert found.accepted_per_position == (9, 6)
    assert found.acceptance_rate == pytest.approx(0.5)
    assert found.acceptance_length == pytest.approx(2.5)
    assert found.source == "metrics"


def test_a_server_without_counters_has_none() -> None:
    async def work(client: Client) -> Any:
        counters = Counters(client)
        await counters.mark()
        return await counters.since()

    assert run(Behaviour(), work) is None


def test_the_client_measures_itself() -> None:
    """A loop that is held up for 100 ms is seen, and an idle one costs little."""

    async def work(client: Client) -> Any:
        calm, busy = Watch(), Watch()
        async with calm.on(client):
            await client.ask(HELLO)
        async with busy.on(client):
            await client.ask(HELLO)
            time.sleep(0.1)  # what is measured is a loop held up
            await asyncio.sleep(0.05)
        return calm.result(), busy.result()

    calm, busy = run(Behaviour(ttft=0.2, tokens=20), work)
    assert calm.chunks == busy.chunks == 23  # the role, 20 tokens, the end, the usage
    assert busy.loop_lag_max_ms > 60
    assert not busy.bounded
    assert calm.loop_lag_p50_ms < 20
    assert calm.cpu_share < 0.8
    assert calm.cpu_us_per_chunk < 5000
    assert Watch().result() is None


def test_as_prompt_keeps_every_message() -> None:
    assert as_prompt([{"role": "system", "content": "A"}, {"role": "user", "content": "B"}]) == "A\n\nB\n\n"


@pytest.mark.parametrize(
    ("body", "message"),
    [
        (b'{"error": {"message": "no"}}', "no"),
        (b'{"error": "no"}', "no"),
        (b'{"detail": "no"}', "no"),
        (b"<html> no </html>", "<html> no </html>"),
        (b"", "(no message)"),
        (b"[1]", "[1]"),
    ],
)
def test_error_messages(body: bytes, message: str) -> None:
    assert error_message(body) == message
