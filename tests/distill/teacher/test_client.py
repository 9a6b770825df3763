"""One question against every fault of a server, with time that passes at once."""

from __future__ import annotations

import asyncio
import contextlib
import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from dfastllm.distill.teacher.budget import Budget
from dfastllm.distill.teacher.cache import AnswerCache
from dfastllm.distill.teacher.client import Reply, TeacherClient, rough_tokens
from dfastllm.distill.teacher.settings import TeacherSettings
from dfastllm.errors import (
    AuthenticationError,
    BudgetError,
    DFastLLMError,
    ModelNotFoundError,
    RateLimitError,
    TeacherError,
    ValidationError,
)
from tests.distill.teacher.conftest import FakeTime
from tests.distill.teacher.mock_teacher import completion

ASK = [{"role": "user", "content": "Why?"}]
KEY = "sk-secret-0123456789"
Answering = Callable[[int, dict[str, Any]], httpx2.Response]


def ok(text: str | None = "Because.", **rest: Any) -> httpx2.Response:
    return httpx2.Response(200, json=completion(text, **rest))


def error(status: int, message: str = "no", code: str = "x", **headers: str) -> httpx2.Response:
    return httpx2.Response(status, json={"error": {"message": message, "code": code}}, headers=headers)


class Bench:
    """A client whose requests are answered by a function of (number of the request, body)."""

    def __init__(self, tmp_path: Path, time: FakeTime, answering: Answering, **settings: Any) -> None:
        self.bodies: list[dict[str, Any]] = []
        self.headers: list[httpx2.Headers] = []
        self.sent_at: list[float] = []
        self.time = time
        self.cache = AnswerCache(tmp_path)
        self.settings = TeacherSettings.of({"base_url": "http://teacher.test", "model": "m", **settings})
        self.budget = Budget(self.settings.budget_tokens)
        self.answering = answering
        self.client: TeacherClient | None = None

    async def _handle(self, request: httpx2.Request) -> httpx2.Response:
        assert str(request.url) == "http://teacher.test/v1/chat/completions"
        self.bodies.append(json.loads(request.content))
        self.headers.append(request.headers)
        self.sent_at.append(self.time.at)
        return self.answering(len(self.bodies) - 1, self.bodies[-1])

    async def all(self, *questions: list[dict[str, Any]]) -> list[Reply | BaseException]:
        self.client = TeacherClient(
            self.settings,
            self.cache,
            budget=self.budget,
            clock=self.time.clock,
            rng=random.Random(0),
            transport=httpx2.MockTransport(self._handle),
        )
        async with self.client as client:
            return await asyncio.gather(*(client.ask(question) for question in questions), return_exceptions=True)

    def ask(self) -> Reply:
        found = asyncio.run(self.all(ASK))[0]
        if isinstance(found, BaseException):
            raise found
        return found

    @property
    def retried(self) -> dict[str, int]:
        assert self.client is not None
        return dict(self.client.counts.retried)


def first(response: Callable[[], httpx2.Response], then: Answering = lambda n, body: ok()) -> Answering:
    return lambda n, body: response() if n == 0 else then(n, body)


def raising(kind: type[Exception]) -> Callable[[], httpx2.Response]:
    def raise_it() -> httpx2.Response:
        raise kind("it broke")

    return raise_it


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        (lambda: error(429), "http_429"),
        (lambda: error(500), "http_500"),
        (lambda: httpx2.Response(502, text="<html>Bad Gateway</html>"), "http_502"),
        (lambda: error(503), "http_503"),
        (lambda: error(529), "http_529"),
        (lambda: error(408), "http_408"),
        (raising(httpx2.ReadTimeout), "timeout"),
        (raising(httpx2.ConnectTimeout), "timeout"),
        (raising(httpx2.ConnectError), "connect"),
        (raising(httpx2.ReadError), "reset"),
        (raising(httpx2.RemoteProtocolError), "reset"),
        (lambda: httpx2.Response(200, text='{"choices": [{'), "bad_json"),
        (lambda: httpx2.Response(200, text="[]"), "bad_json"),
        (lambda: httpx2.Response(200, text=""), "bad_json"),
        (lambda: httpx2.Response(200, text="{}"), "bad_json"),
        (lambda: httpx2.Response(200, content=b"\xff\x00garbage"), "bad_json"),
        (lambda: httpx2.Response(200, json={"error": {"message": "overloaded"}}), "server_error"),
        (lambda: ok(""), "empty"),
        (lambda: ok(None), "empty"),
    ],
)
def test_what_passes_is_tried_again(tmp_path: Path, time: FakeTime, fault: Any, reason: str) -> None:
    bench = Bench(tmp_path, time, first(fault))
    assert bench.ask().answer.content == "Because."
    assert bench.retried == {reason: 1}
    assert len(bench.bodies) == 2
    assert 0.5 <= time.slept[0] <= 1.0  # half to all of the first backoff


@pytest.mark.parametrize(
    ("fault", "kind", "words"),
    [
        (lambda: error(400, "max_tokens is too large"), ValidationError, "answered 400: max_tokens is too large"),
        (lambda: error(401, f"Incorrect API key provided: {KEY}"), AuthenticationError, "provided: \\*\\*\\*"),
        (lambda: error(403), AuthenticationError, "answered 403"),
        (lambda: error(404), ModelNotFoundError, "for model 'm'"),
        (lambda: httpx2.Response(422, json={"detail": "not so"}), ValidationError, "not so"),
        (lambda: httpx2.Response(307, headers={"location": "http://evil.test"}), ValidationError, "redirect"),
        (lambda: error(429, "You exceeded your quota", "insufficient_quota"), RateLimitError, "quota is used up"),
    ],
)
def test_what_does_not_pass_is_told_at_once(
    tmp_path: Path, time: FakeTime, fault: Any, kind: type[DFastLLMError], words: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("TEACHER_KEY", KEY)
    bench = Bench(tmp_path, time, first(fault), api_key_env="TEACHER_KEY")
    with pytest.raises(kind, match=words) as told:
        bench.ask()
    assert type(told.value) is kind
    assert len(bench.bodies) == 1
    assert time.slept == []
    assert KEY not in str(told.value)
    assert bench.budget.prompt + bench.budget.completion == 0
    assert not list(tmp_path.rglob("*.json"))


def test_the_key_goes_to_the_server_and_nowhere_else(
    tmp_path: Path, time: FakeTime, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("DEBUG")
    monkeypatch.setenv("TEACHER_KEY", KEY)
    bench = Bench(tmp_path, time, lambda n, body: ok(), api_key_env="TEACHER_KEY")
    bench.ask()
    assert bench.headers[0]["authorization"] == f"Bearer {KEY}"
    assert bench.client is not None
    told = [repr(bench.client.settings), repr(bench.client.describe()), caplog.text, *map(str, bench.bodies)]
    told += [path.read_text() for path in tmp_path.rglob("*.json")]
    assert len(told) == 5
    assert not any(KEY in text for text in told)
    monkeypatch.delenv("TEACHER_KEY")
    with pytest.raises(ValidationError, match="TEACHER_KEY, which is not set"):
        bench.ask()


def test_retry_after_is_waited_for_by_everybody(tmp_path: Path, time: FakeTime) -> None:
    def answering(n: int, body: dict[str, Any]) -> httpx2.Response:
        return error(429, **{"Retry-After": "40"}) if n == 0 else ok()

    async def sleep(seconds: float) -> None:
        """Whoever can do something now does it before time passes."""
        until = time.at + seconds
        for _ in range(50):
            await asyncio.sleep(0)
        time.at = max(time.at, until)

    time.sleep = sleep  # type: ignore[method-assign]
    bench = Bench(tmp_path, time, answering, concurrency=1)
    others = [[{"role": "user", "content": text}] for text in "ab"]
    asyncio.run(bench.all(ASK, *others))
    assert bench.sent_at[0] == 1000
    assert min(bench.sent_at[1:]) >= 1040
    assert max(bench.sent_at) < 1041


def test_a_date_in_retry_after(tmp_path: Path, time: FakeTime) -> None:
    from email.utils import formatdate

    bench = Bench(
        tmp_path, time, first(lambda: error(503, **{"Retry-After": formatdate(time.wall() + 25, usegmt=True)}))
    )
    bench.ask()
    assert 1024 <= bench.sent_at[1] <= 1026


def test_a_wait_that_is_too_long_ends_it(tmp_path: Path, time: FakeTime) -> None:
    bench = Bench(tmp_path, time, first(lambda: error(429, **{"Retry-After": "7200"})), longest_wait=600)
    with pytest.raises(RateLimitError, match="asked again in 7200 s") as told:
        bench.ask()
    assert told.value.retry_after == 7200
    assert len(bench.bodies) == 1


def test_attempts_end_and_say_why(tmp_path: Path, time: FakeTime) -> None:
    bench = Bench(tmp_path, time, lambda n, body: error(503, "warming up"), attempts=4, backoff=2.0, backoff_most=5.0)
    with pytest.raises(TeacherError, match=r"4 attempts failed, the last with http_503: warming up") as told:
        bench.ask()
    assert told.value.reason == "http_503"
    assert len(bench.bodies) == 4
    for slept, full in zip(time.slept, [2, 4, 5], strict=True):
        assert full / 2 <= slept <= full


def test_a_question_has_a_deadline(tmp_path: Path, time: FakeTime) -> None:
    bench = Bench(tmp_path, time, lambda n, body: error(500), attempts=100, row_deadline=60)
    with pytest.raises(TeacherError, match=r"60 s \(row_deadline\) are over"):
        bench.ask()
    assert time.at <= 1060
    assert len(bench.bodies) > 3


def test_an_attempt_has_a_deadline_too(tmp_path: Path, time: FakeTime) -> None:
    """In real time: a server that answers nothing."""

    async def stalled(request: httpx2.Request) -> httpx2.Response:
        await asyncio.sleep(60)
        return ok()

    bench = Bench(tmp_path, time, lambda n, body: ok(), timeout=0.05, attempts=2)
    bench._handle = stalled  # type: ignore[method-assign]
    with pytest.raises(TeacherError, match=r"timeout: no complete answer within 0\.05 s"):
        bench.ask()


def test_an_empty_answer_is_kept_in_the_end(tmp_path: Path, time: FakeTime) -> None:
    bench = Bench(tmp_path, time, lambda n, body: ok(""), attempts=3)
    assert bench.ask().answer.empty
    assert len(bench.bodies) == 3
    assert bench.ask().cached  # it was paid for: it is not asked again
    assert len(bench.bodies) == 3


def test_an_answer_is_asked_for_once(tmp_path: Path, time: FakeTime) -> None:
    bench = Bench(tmp_path, time, lambda n, body: ok(f"Because {n}."))
    replies = asyncio.run(bench.all(ASK, ASK, ASK))
    assert [reply.answer.content for reply in replies if isinstance(reply, Reply)] == ["Because 0."] * 3
    assert sorted(reply.cached for reply in replies if isinstance(reply, Reply)) == [False, True, True]
    assert bench.ask().cached
    assert len(bench.bodies) == 1
    path = next(tmp_path.rglob("*.json"))
    path.write_bytes(path.read_bytes()[:-9])
    assert bench.ask().answer.content == "Because 1."
    assert bench.cache.damaged == 1
    assert bench.client is not None
    bench.cache.put(bench.client.key(ASK, ()), {"choices": []})  # sound, and no answer
    assert bench.ask().answer.content == "Because 2."
    assert bench.cache.damaged == 2


def test_the_request(tmp_path: Path, time: FakeTime) -> None:
    options = {"top_p": 0.9, "max_tokens": None, "max_completion_tokens": 7}
    bench = Bench(tmp_path, time, lambda n, body: ok(), temperature=0.5, top_logprobs=5, options=options)
    bench.ask()
    assert bench.bodies[0] == {
        "model": "m",
        "messages": ASK,
        "temperature": 0.5,
        "seed": 0,
        "logprobs": True,
        "top_logprobs": 5,
        "top_p": 0.9,
        "max_completion_tokens": 7,
        "return_token_ids": True,
        "return_tokens_as_token_ids": True,
    }
    plain = Bench(tmp_path, time, lambda n, body: ok(), top_logprobs=0, seed=None)
    plain.ask()
    assert plain.bodies[0] == {"model": "m", "messages": ASK, "max_tokens": 256, "temperature": 0.0}


def test_a_server_that_does_not_know_our_fields_is_asked_without(tmp_path: Path, time: FakeTime) -> None:
    def strict(n: int, body: dict[str, Any]) -> httpx2.Response:
        if "return_token_ids" in body:
            return error(400, "Unrecognized request argument supplied: return_token_ids")
        return ok()

    bench = Bench(tmp_path, time, strict)
    asyncio.run(bench.all(ASK))
    assert ["return_token_ids" in body for body in bench.bodies] == [True, False]
    assert time.slept == []
    assert bench.retried == {}


def test_tokens_a_minute_are_corrected_by_usage(tmp_path: Path, time: FakeTime) -> None:
    """600 a minute, 10 at once. A question takes its prompt and max_tokens, and gives back what it did not use: then 20
    tokens are two seconds, and not the twelve of what it might have used."""
    questions = [[{"role": "user", "content": text}] for text in "abcdef"]
    bench = Bench(
        tmp_path, time, lambda n, body: ok(usage=(10, 10)), max_tokens=100, tokens_per_minute=600, concurrency=1
    )
    asyncio.run(bench.all(*questions))
    assert [at - 1000 for at in bench.sent_at] == pytest.approx([0, 2, 4, 6, 8, 10])


def test_the_budget_is_never_passed(tmp_path: Path, time: FakeTime) -> None:
    questions = [[{"role": "user", "content": f"Question {n:02}"}] for n in range(20)]
    prompt = rough_tokens(questions[0], ())
    bench = Bench(tmp_path, time, lambda n, body: ok(usage=(prompt, 40)), max_tokens=40, budget_tokens=500)
    found = asyncio.run(bench.all(*questions))
    served = [one for one in found if isinstance(one, Reply)]
    refused = [one for one in found if isinstance(one, BudgetError)]
    assert len(served) + len(refused) == 20
    assert len(served) == 500 // (prompt + 40) == len(bench.bodies)
    assert bench.budget.prompt + bench.budget.completion == len(served) * (prompt + 40)


def test_what_an_unknown_outcome_may_have_cost_is_spent(tmp_path: Path, time: FakeTime) -> None:
    prompt = rough_tokens(ASK, ())
    bench = Bench(tmp_path, time, first(raising(httpx2.ReadError)), max_tokens=40)
    bench.ask()
    assert bench.budget.unsettled == prompt + 40
    assert bench.budget.prompt + bench.budget.completion == prompt + 40 + 15  # and the answer's own usage
    untold = Bench(tmp_path / "other", time, lambda n, body: ok(usage=None), max_tokens=40)
    untold.ask()
    assert untold.budget.unsettled == prompt + 40
    refused = Bench(tmp_path / "third", time, first(lambda: error(429)), max_tokens=40)
    refused.ask()
    assert refused.budget.prompt + refused.budget.completion == 15


@contextlib.contextmanager
def serving(*names: str) -> Iterator[httpx2.MockTransport]:
    def handle(request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/v1/models":
            return httpx2.Response(200, json={"data": [{"id": name} for name in names]})
        return ok(json.loads(request.content)["model"])

    yield httpx2.MockTransport(handle)


def test_the_only_model_needs_no_name(tmp_path: Path) -> None:
    settings = TeacherSettings.of({"base_url": "http://teacher.test/v1/"})

    async def ask(transport: httpx2.MockTransport) -> str:
        async with TeacherClient(settings, AnswerCache(tmp_path), transport=transport) as client:
            assert client.describe()["model"] == client.model
            return (await client.ask(ASK)).answer.content

    with serving("qwen") as transport:
        assert asyncio.run(ask(transport)) == "qwen"
    for names in (("a", "b"), ()):
        with serving(*names) as transport, pytest.raises(ModelNotFoundError, match=f"has {len(names)} models"):
            asyncio.run(ask(transport))


@pytest.mark.parametrize(
    ("fields", "words"),
    [
        ({"base_url": "teacher:8000"}, "base_url: must be http"),
        ({"base_url": "http://user:pw@teacher/v1"}, "no user and no password"),
        ({"base_url": "http://teacher/v1?key=1"}, "must end with its path"),
        ({"top_logprobs": 21}, "top_logprobs"),
        ({"concurrency": 0}, "concurrency"),
        ({"temperature": -1}, "temperature"),
        ({"options": {"messages": []}}, "must not hold messages"),
        ({"budget_price": 3}, "needs price_prompt or price_completion"),
        ({"max_token": 3}, "max_token"),
        ({"timeout": float("inf")}, "timeout"),
    ],
)
def test_settings_that_are_wrong_are_told_by_name(fields: dict[str, Any], words: str) -> None:
    with pytest.raises(ValidationError, match=words):
        TeacherSettings.of({"base_url": "http://teacher.test", "model": "m", **fields})
