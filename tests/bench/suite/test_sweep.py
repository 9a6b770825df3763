"""Probing, choosing and comparing configurations on a mock server that speculates by a known factor."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from dfastllm.bench.suite.client import Client
from dfastllm.bench.suite.configurations import Axes, configurations, parse_custom, vet
from dfastllm.bench.suite.probe import Fields, connect, normalise, probe
from dfastllm.bench.suite.record import Recorder
from dfastllm.bench.suite.sweep import ServerLost, Settings, Sweep, Trial
from dfastllm.bench.suite.workloads import prompt_types
from dfastllm.errors import ValidationError
from tests.kit.mock_server import Behaviour, MockServer, faster

SPECULATES = Behaviour(ttft=0.01, itl=0.004, tokens=12, honours={"speculative_config": faster(1.1)})
FEW = Settings(requests=2, rounds=3, max_tokens=16)


def with_client(server: MockServer, work: Callable[[Client], Awaitable[Any]]) -> Any:
    async def inside() -> Any:
        client = Client(server.url, "mock", timeout=5.0)
        try:
            return await work(client)
        finally:
            await client.aclose()

    return asyncio.run(inside())


@contextmanager
def babbling(reply: bytes) -> Iterator[str]:
    """A port that answers every connection with these bytes and closes it."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        listener.settimeout(5)

        def serve() -> None:
            try:
                while True:
                    connection, _ = listener.accept()
                    with connection:
                        connection.recv(4096)
                        connection.sendall(reply)
                        connection.shutdown(socket.SHUT_WR)
                        connection.settimeout(1)
                        while connection.recv(4096):  # closing on unread bytes would reset the connection
                            pass
            except OSError:
                return

        thread = threading.Thread(target=serve, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{listener.getsockname()[1]}"


@pytest.mark.parametrize(
    ("given", "root"),
    [
        ("http://h:1/v1/", "http://h:1"),
        ("h:8000", "http://h:8000"),
        ("https://h/api/v1", "https://h/api"),
        (" http://[::1]:80 ", "http://[::1]:80"),
    ],
)
def test_urls_are_brought_to_their_root(given: str, root: str) -> None:
    assert normalise(given) == root


@pytest.mark.parametrize("bad", ["", "ftp://h", "http://", "http://h:99999", "http://h:x", "http://h?x=1"])
def test_what_is_no_url_is_refused(bad: str) -> None:
    with pytest.raises(ValidationError):
        normalise(bad)


def test_a_running_server_is_described() -> None:
    with MockServer(replace(SPECULATES, models=({"id": "m1", "owned_by": "vllm"}, {"id": "m2"}))) as server:
        status = asyncio.run(probe("x", server.url))
    assert (status.status, status.models, status.software) == ("running", ("m1", "m2"), "vLLM")
    assert status.latency_ms is not None
    assert 0 < status.latency_ms < 500


@pytest.mark.parametrize(
    ("code", "word"), [(401, "unauthorised"), (503, "loading"), (404, "not_openai"), (500, "not_openai")]
)
def test_why_a_server_cannot_be_used(code: int, word: str) -> None:
    with MockServer(Behaviour(models_status=code)) as server:
        assert asyncio.run(probe("x", server.url)).status == word


@pytest.mark.parametrize(
    ("reply", "word"),
    [
        (b"SSH-2.0-OpenSSH_9.2\r\n", "not_http"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "not_openai"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello", "not_openai"),
    ],
)
def test_something_else_listens_there(reply: bytes, word: str) -> None:
    with babbling(reply) as url:
        assert asyncio.run(probe("x", url)).status == word


def test_nothing_listens_there() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        port = listener.getsockname()[1]
    status = asyncio.run(probe("x", f"http://127.0.0.1:{port}"))
    assert status.status == "refused"
    assert "Nothing listens" in status.message


def test_silence_is_a_timeout() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        status = asyncio.run(probe("x", f"http://127.0.0.1:{listener.getsockname()[1]}", timeout=0.3))
    assert status.status == "timeout"


@pytest.mark.parametrize(
    ("behaviour", "fallback", "usage", "ids"),
    [
        (Behaviour(), None, True, True),
        (Behaviour(refuses=frozenset({"return_token_ids"})), "without return_token_ids", True, False),
        (
            Behaviour(refuses=frozenset({"return_token_ids", "stream_options"})),
            "without return_token_ids and stream_options",
            False,
            False,
        ),
        (Behaviour(refuses=frozenset({"messages"})), "without chat completions", True, True),
        (Behaviour(usage=False), "no usage", True, True),
        (Behaviour(token_ids=False), "no token ids", True, True),
    ],
)
def test_what_a_server_lacks_is_done_without_and_said(
    behaviour: Behaviour, fallback: str | None, usage: bool, ids: bool
) -> None:
    with MockServer(behaviour) as server:

        async def work() -> tuple[Any, Any]:
            status = await probe("x", server.url)
            client, target = await connect(status, None)
            await client.aclose()
            return client.features, target

        features, target = asyncio.run(work())
    assert (features.include_usage, features.token_ids) == (usage, ids)
    assert features.api == ("completions" if "messages" in behaviour.refuses else "chat")
    assert (fallback is None and not target.fallbacks) or fallback in " ".join(target.fallbacks)
    assert (target.model, target.kind) == ("mock", "ar")


def test_a_server_that_answers_nothing_is_refused_with_its_words() -> None:
    with MockServer(Behaviour(status=500)) as server:
        status = asyncio.run(probe("x", server.url))
        with pytest.raises(ValidationError, match="told to fail"):
            asyncio.run(connect(status, None))
        with pytest.raises(ValidationError, match="no model 'other'"):
            asyncio.run(connect(status, "other"))


def test_fields_are_honoured_refused_or_ignored() -> None:
    behaviour = replace(SPECULATES, refuses=frozenset({"cache"}))
    with MockServer(behaviour) as server:

        async def work(client: Client) -> tuple[list[str | None], dict[str, str]]:
            fields = Fields(client)
            asked = [{"speculative_config": {"method": "ngram"}}, {"cache": "dual"}, {"threshold": 0.9}, {}]
            return [await fields.refusal(options) for options in asked], dict(fields.found)

        why, found = with_client(server, work)
    assert why[0] is None
    assert why[1] == "unknown field cache"
    assert why[2] is not None
    assert "ignores threshold" in why[2]
    assert why[3] is None
    assert found == {"speculative_config": "yes", "cache": "no", "threshold": "ignored"}


def test_a_baseline_the_server_does_not_know_is_its_default() -> None:
    with MockServer(Behaviour()) as server:  # which ignores every field
        wanted = configurations("ar", Axes(ks=(3,), methods=("ngram",)), 16)
        able, refused, notes = with_client(server, lambda client: vet(wanted, Fields(client)))
    assert [(c.name, c.options) for c in able] == [("default", {})]
    assert able[0].baseline
    assert [c.name for c, _ in refused] == ["ngram-3"]
    assert "the server's own default" in notes[0]


def test_configurations_of_each_kind() -> None:
    names = [c.name for c in configurations("ar", Axes(ks=(3, 7), methods=("ngram", "suffix")), 16)]
    assert names == ["none", "ngram-3", "ngram-7", "suffix-3", "suffix-7"]
    axes = Axes(caches=("none", "dual"), thresholds=(0.7, 0.9), factors=(0.5,), steps=(4,), rules=("free_dave",))
    names = [c.name for c in configurations("diffusion", axes, 16)]
    assert names[0] == "plain"
    assert {"none-t0.7", "dual-t0.9", "dual-f0.5", "dual-s4", "dual-free_dave", "dual-plain"} <= set(names)
    assert len(names) == 1 + 5 + 6
    assert [c.name for c in configurations("block", Axes(thresholds=(0.9,), rules=()), 16)] == ["plain", "t0.9"]


def test_remembered_answers_are_kept_out_of_suffix_drafts() -> None:
    suffix = configurations("ar", Axes(ks=(3,), methods=("suffix",), adaptive=False), 16)[1]
    config = suffix.options["speculative_config"]
    assert (config["suffix_decoding_max_cached_requests"], config["adaptive"]) == (0, False)


@pytest.mark.parametrize(
    "axes",
    [{"ks": (0,)}, {"methods": ("magic",)}, {"caches": ("big",)}, {"thresholds": (0.0,)}, {"factors": (-1.0,)}],
)
def test_axes_that_cannot_be(axes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Axes(**axes)


@pytest.mark.parametrize("text", ["a", "a=", "a=[1]", "={}", "a={", ""])
def test_custom_configurations_that_cannot_be(text: str) -> None:
    with pytest.raises(ValidationError):
        parse_custom(text)


def test_a_custom_configuration_may_not_take_a_name() -> None:
    custom = parse_custom('none={"top_k": 1}')
    assert custom.options == {"top_k": 1}
    with pytest.raises(ValidationError, match="Two configurations"):
        configurations("ar", Axes(), 16, [custom])


def trials(*names: str) -> list[Trial]:
    made = [Trial("none", {"speculative_config": {"method": "none"}})]
    for name in names:
        k = int(name.partition("-")[2])
        made.append(Trial(name, {"speculative_config": {"method": "ngram", "num_speculative_tokens": k}}))
    return made


def test_a_sweep_finds_the_known_speedup(tmp_path: Path) -> None:
    """k = 3: 12 tokens in 3 chunks of 4; 20 + 2 * 22 ms against 20 + 11 * 20 ms: 3.75 times as fast."""
    sources = {name: prompt_types()[name] for name in ("code", "security")}
    with MockServer(replace(SPECULATES, ttft=0.02, itl=0.02)) as server, Recorder(tmp_path / "r.jsonl") as record:

        async def work(client: Client) -> Sweep:
            sweep = Sweep(client, trials("ngram-3"), sources, replace(FEW, rounds=6), record=record)
            await sweep.run()
            return sweep

        sweep = with_client(server, work)
        bodies = list(server.bodies)
    base, fast = (sweep.figures(trial) for trial in sweep.trials)
    assert base is not None
    assert fast is not None
    assert base.versus_baseline is None
    gain = fast.versus_baseline
    assert gain is not None
    assert gain.verdict == "faster"
    assert len(gain.rounds) == 6
    assert gain.ratio == pytest.approx(240 / 64, rel=0.3)
    assert fast.equality is not None
    assert (fast.equality.compared, fast.equality.equal, fast.equality.by) == (24, 24, "tokens")
    assert fast.speculation is not None
    assert fast.speculation.acceptance_length == pytest.approx(4.0)
    assert fast.forwards is not None
    assert fast.forwards.tokens_per_forward == pytest.approx(4.0)
    # twelve answers of 12 tokens a type; the warm-up and the one-token questions count in nothing
    assert base.speed.output_tokens == fast.speed.output_tokens == 2 * 12 * 12
    rows = [json.loads(line) for line in (tmp_path / "r.jsonl").read_text().splitlines()]
    assert len(rows) == 2 * 24
    assert {row["name"] for row in rows} == {"none", "ngram-3"}
    # round by round both configurations asked the same questions, and another one began
    asked = [body for body in bodies if body["max_tokens"] == 16][4:]  # after the warm-up
    methods = [body["speculative_config"]["method"] for body in asked]
    assert methods == (["none", "none", "ngram", "ngram"] * 2 + ["ngram", "ngram", "none", "none"] * 2) * 3


def test_other_answers_are_not_equal_and_failures_are_counted() -> None:
    """One configuration changes the text, another fails: neither passes for the baseline."""

    def change(value: Any, b: Behaviour) -> Behaviour | None:
        if not isinstance(value, str):
            return None
        return replace(b, word="bad ", token_ids=False) if value == "other" else replace(b, fault="bad_json")

    behaviour = Behaviour(ttft=0.005, itl=0.001, tokens=5, honours={"cache": change}, token_ids=False)
    sources = {"security": prompt_types()["security"]}
    with MockServer(behaviour) as server:

        async def work(client: Client) -> Sweep:
            kinds = [Trial("none"), Trial("other", {"cache": "other"}), Trial("broken", {"cache": "broken"})]
            sweep = Sweep(client, kinds, sources, FEW)
            await sweep.run()
            return sweep

        sweep = with_client(server, work)
    other, broken = (sweep.figures(trial) for trial in sweep.trials[1:])
    assert other is not None
    assert other.equality is not None
    assert (other.equality.equal, other.equality.by) == (0, "text")
    assert broken is not None
    assert (broken.speed.requests, broken.speed.errors, broken.speed.error_kinds) == (0, 6, {"malformed": 6})
    assert broken.versus_baseline is None
    assert [turn.output_throughput for turn in sweep.rounds(sweep.trials[2])] == [None] * 3


def test_a_server_that_dies_leaves_what_was_measured() -> None:
    sources = {"security": prompt_types()["security"]}
    with MockServer(Behaviour(ttft=0.005, itl=0.001), stop_after=9) as server:

        async def work(client: Client) -> Sweep:
            sweep = Sweep(client, [Trial("none")], sources, FEW)
            with pytest.raises(ServerLost, match="stopped answering"):
                await sweep.run()
            return sweep

        sweep = with_client(server, work)
    made = sweep.figures(sweep.trials[0])
    assert made is not None
    # two of warm-up, two shared, two of round one, two shared: the ninth is the last
    assert made.speed.requests == 3
    assert made.speed.errors >= 1
