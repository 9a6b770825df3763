"""Whatever the body, the answer is 200 or a named refusal: never a 500, never a hang, and nothing is left running."""

from __future__ import annotations

import json
from collections.abc import Iterator
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dfastllm.server.schemas import ChatRequest, CompletionRequest
from tests.kit.live import Live

NUMBERS = st.one_of(
    st.integers(-3, 40),
    st.floats(allow_nan=False, allow_infinity=False),
    st.sampled_from([10**30, -(2**63), 2**31, 1e308, 5e-324, 0.5, 1.0]),
)
TEXT = st.text(max_size=12) | st.sampled_from(["<|mask|>", "<|end|>", "\x00", "é✓", "a" * 600])
SCALARS = st.none() | st.booleans() | NUMBERS | TEXT
ANY = st.recursive(
    SCALARS,
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)
IDS = st.lists(st.integers(-1, 262), max_size=5)
ALMOST: dict[str, st.SearchStrategy[Any]] = {
    "model": st.sampled_from(["canvas", "causal", "blocks"]),
    "prompt": TEXT | IDS | st.lists(TEXT, max_size=3) | st.lists(IDS, max_size=3),
    "suffix": TEXT,
    "max_tokens": st.integers(0, 30),
    "min_tokens": st.integers(0, 8),
    "n": st.integers(0, 3),
    "logprobs": st.integers(0, 21) | st.booleans(),
    "top_logprobs": st.integers(0, 21),
    "stop": TEXT | st.lists(TEXT, max_size=3),
    "temperature": st.floats(0, 3) | st.sampled_from([0.0, 1e-30, 1e30]),
    "top_p": st.floats(0, 1),
    "min_p": st.floats(0, 1),
    "top_k": st.integers(-1, 300),
    "seed": st.integers(-(2**63), 2**63 - 1),
    "repetition_penalty": st.floats(0, 10) | st.sampled_from([1e-300, 1e300]),
    "presence_penalty": st.floats(-2, 2),
    "frequency_penalty": st.floats(-2, 2),
    "logit_bias": st.dictionaries(st.integers(0, 262).map(str) | TEXT, st.floats(-101, 101), max_size=3),
    "allowed_token_ids": IDS,
    "stop_token_ids": IDS,
    "priority": st.integers(-(2**63), 2**63 - 1),
    "timeout": st.floats(0, 100),
    "stream": st.booleans(),
    "stream_options": st.fixed_dictionaries(
        {}, optional={"include_usage": st.booleans(), "canvas_events": st.booleans()}
    ),
    "steps": st.integers(-1, 64),
    "block_length": st.integers(-1, 64),
    "threshold": st.floats(-0.5, 1.5),
    "factor": st.floats(-1, 5),
    "remasking": st.sampled_from(["low_confidence", "random", "entropy", "margin", "worst"]),
    "rule": st.sampled_from(["schedule", "threshold", "nothing"]),
    "rule_options": st.dictionaries(TEXT | st.sampled_from(["window", "max_parallel_tokens"]), SCALARS, max_size=2),
    "messages": st.lists(
        st.fixed_dictionaries(
            {"role": st.sampled_from(["system", "user", "assistant", "tool"]), "content": TEXT | st.none()},
            optional={"name": TEXT, "tool_call_id": TEXT},
        ),
        max_size=3,
    ),
    "tools": st.lists(
        st.fixed_dictionaries({"type": st.just("function"), "function": st.fixed_dictionaries({"name": TEXT})}),
        max_size=2,
    ),
}


def bodies(base: dict[str, Any], fields: set[str]) -> st.SearchStrategy[Any]:
    """Mostly right bodies: a good one, with some fields almost right, and sometimes one of any kind."""
    names = st.lists(st.sampled_from(sorted(fields & ALMOST.keys())), max_size=4, unique=True)
    near = names.flatmap(lambda chosen: st.fixed_dictionaries({name: ALMOST[name] for name in chosen}))
    wild = st.dictionaries(st.sampled_from(sorted(fields)) | st.text(max_size=5), ANY, max_size=1)
    rarely = st.sampled_from([False] * 7 + [True])
    good = st.builds(lambda a, b, use: {**base, **a, **(b if use else {})}, near, wild, rarely)
    return rarely.flatmap(lambda any_at_all: ANY if any_at_all else good)


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=30) as client:
        yield client


def check(live: Live, http: httpx.Client, path: str, body: Any) -> None:
    data = json.dumps(body).encode()  # lone surrogates and huge numbers included
    answer = http.post(live.url + path, content=data, headers={"Content-Type": "application/json"})
    assert answer.status_code in (200, 400, 404, 429, 504), (answer.status_code, answer.text[:500])
    if answer.status_code != 200:
        error = answer.json()["error"]
        assert error["message"]
        assert error["type"] == ("server_error" if answer.status_code == 504 else error["type"])
    elif answer.headers["content-type"].startswith("text/event-stream"):
        lines = [line for line in answer.text.split("\n") if line]
        assert lines[-1] == "data: [DONE]"
        for line in lines[:-1]:
            chunk = json.loads(line.removeprefix("data: "))
            assert chunk.get("error", {}).get("code") in (None, "timeout"), chunk
    else:
        assert answer.json()["choices"]


FUZZ = settings(max_examples=80, deadline=None, suppress_health_check=list(HealthCheck))


@FUZZ
@given(body=bodies({"model": "canvas", "prompt": "ab", "max_tokens": 4}, set(CompletionRequest.model_fields)))
def test_completions(live: Live, http: httpx.Client, body: Any) -> None:
    check(live, http, "/v1/completions", body)


@FUZZ
@given(
    body=bodies(
        {"model": "causal", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 4},
        set(ChatRequest.model_fields),
    )
)
def test_chat(live: Live, http: httpx.Client, body: Any) -> None:
    check(live, http, "/v1/chat/completions", body)


def test_lone_surrogates_anywhere(live: Live, http: httpx.Client) -> None:
    bad = "a\ud800b"
    good = {"model": "causal", "prompt": "x", "max_tokens": 2}
    for change in (
        {"prompt": bad},
        {"model": bad},
        {"stop": bad},
        {bad: 1},
        {"logit_bias": {bad: 1}},
        {"metadata": {bad: bad}},
        {"model": "canvas", "rule_options": {bad: bad}},
        {"model": "canvas", "suffix": bad},
    ):
        check(live, http, "/v1/completions", {**good, **change})
    tool = {"type": "function", "function": {"name": "f", "parameters": {bad: bad}}}
    chat = {"model": "causal", "messages": [{"role": "user", "content": "x"}], "max_tokens": 2}
    check(live, http, "/v1/chat/completions", {**chat, "tools": [tool]})
    check(live, http, "/v1/chat/completions", {**chat, "messages": [{"role": "user", "content": bad}]})


def test_nothing_is_left_running(live: Live) -> None:
    assert live.serving.jobs == {}
    for engine in live.worker.engines.values():
        assert engine.pages.used == 0
        assert not engine.has_work
