"""Bounds before work: a body is counted before anything is made of it, a prompt measured before it is encoded."""

from __future__ import annotations

import json
import sys
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dfastllm.errors import DFastLLMError, PayloadTooLargeError, ValidationError
from dfastllm.server import bounds
from dfastllm.server.body import Body
from dfastllm.server.bounds import DEPTH, MOST, VALUES, read_json
from dfastllm.server.pipelines.schema import PipelineBody
from dfastllm.server.reading import read_body
from dfastllm.server.schemas import ChatRequest, CompletionRequest, DetokenizeRequest, TokenizeRequest
from dfastllm.text import Tokenizer
from tests.kit.bombs import BOMBS, Bomb
from tests.kit.live import Live, serving
from tests.kit.served import random_engine

KINDS: dict[str, type[Body]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
    "/tokenize": TokenizeRequest,
    "/detokenize": DetokenizeRequest,
}
HOSTILE = st.text(st.sampled_from('"\\[]{},:a\u2222\n'), max_size=8)
JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-9, 9) | HOSTILE,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(HOSTILE, inner, max_size=4),
    max_leaves=20,
)


def told(value: Any) -> tuple[int, int, int, int]:
    """(values, texts, lists and objects, depth) of a value of JSON, by walking it. An object's names are no values;
    an empty list or object is two."""
    if isinstance(value, str):
        return 1, 1, 0, 0
    if not isinstance(value, list | dict):
        return 1, 0, 0, 0
    inner = [told(each) for each in (value.values() if isinstance(value, dict) else value)]
    names = len(value) if isinstance(value, dict) else 0
    values, texts, nested = (sum(one[i] for one in inner) for i in range(3))
    return values + 1 + (not inner), texts + names, nested + 1, max((one[3] for one in inner), default=0) + 1


@settings(deadline=None)
@given(value=JSON, ascii=st.booleans())
def test_what_is_counted_is_what_is_there(value: Any, ascii: bool) -> None:
    """Against a walk over the parsed value."""
    data = json.dumps(value, ensure_ascii=ascii).encode()
    assert bounds.counted(data) == told(value)
    assert read_json(data) == value


@pytest.mark.parametrize(
    ("data", "error", "words"),
    [
        (b"[" + b"1," * VALUES + b"1]", PayloadTooLargeError, "values"),
        (b"[" + b'"",' * (bounds.TEXTS + 1) + b"1]", PayloadTooLargeError, "texts"),
        (b"[" + b"{}," * bounds.TEXTS + b"1]", PayloadTooLargeError, "lists and objects"),
        (b"[" * (DEPTH + 1) + b"]" * (DEPTH + 1), ValidationError, f"lie {DEPTH + 1} deep"),
        (b"[" * 60_000, ValidationError, "deep"),
        (b'{"a":"\xff"}', ValidationError, "not UTF-8"),
        ("[1]".encode("utf-16"), ValidationError, "not UTF-8"),
        (b"[1, 2", ValidationError, "not valid JSON"),
        (b"[" + b"9" * 5000 + b"]", ValidationError, "too many digits"),
        (b'["\\', ValidationError, "not valid JSON"),
    ],
)
def test_what_is_refused(data: bytes, error: type[DFastLLMError], words: str) -> None:
    with pytest.raises(error, match=words):
        read_json(data)


def test_what_is_just_taken() -> None:
    assert len(read_json(b"[" + b"1," * (VALUES - 2) + b"1]")) == VALUES - 1
    assert len(read_json(b"[" + b'"",' * (bounds.TEXTS - 1) + b"1]")) == bounds.TEXTS
    read_json(b"[" * DEPTH + b"]" * DEPTH)
    text = 'a text, with "quotes", [brackets] and \\ in it: ' * 100_000
    assert read_json(json.dumps(text).encode()) == text
    assert read_json(b"\xef\xbb\xbf[1]") == [1]


def _parts(schema: dict[str, Any], where: str = "") -> Iterator[tuple[str, dict[str, Any]]]:
    """(path, schema) of every list and object of free names in a JSON schema."""
    free = schema.get("type") == "object" and "properties" not in schema
    if schema.get("type") == "array" or free:
        yield where, schema
    for name, inner in {**schema.get("properties", {}), **schema.get("$defs", {})}.items():
        yield from _parts(inner, f"{where}.{name}".lstrip("."))
    for inner in (schema.get("items"), *schema.get("anyOf", ()), *schema.get("oneOf", ())):
        if isinstance(inner, dict):
            limits: dict[str, Any] = {key: schema[key] for key in ("maxItems", "maxProperties") if key in schema}
            yield from _parts({**limits, **inner}, where)


@pytest.mark.parametrize("kind", KINDS.values())
def test_every_list_and_object_has_a_bound(kind: type[Body]) -> None:
    """Prompts in token ids have their own: the context, max_prompts and max_body_values."""
    open_ended = [
        path for path, part in _parts(kind.model_json_schema()) if not {"maxItems", "maxProperties"} & {*part}
    ]
    assert {*open_ended} <= {"prompt", "tokens"}


def _longer(name: str, extra: int) -> dict[str, Any]:
    """A chat whose field `name` has its most items and `extra` more."""
    count = MOST[name] + extra
    tool = {"type": "function", "function": {"name": "f"}}
    said = {"role": "user", "content": "x"}
    call = {"id": "a", "type": "function", "function": {"name": "f"}}
    fields: dict[str, Any] = {
        "messages": [said] * count,
        "tools": [tool] * count,
        "parameters": {str(i): 1 for i in range(count)},
        "content": [{"type": "text", "text": "x"}] * count,
        "tool_calls": [call] * count,
        "stop": ["ab"] * count,
        "modalities": ["text"] * count,
        "stop_token_ids": [1] * count,
        "allowed_token_ids": [1] * count,
    }
    value = fields.get(name, {str(i): 1 for i in range(count)})
    step: dict[str, Any] = {"id": "a", "input": "x"}
    if name == "steps":
        return {"name": "p", "steps": [step] * count}
    if name == "modules":
        return {"name": "p", "steps": [step], "modules": {str(i): {"wat": "x"} for i in range(count)}}
    if name == "options":
        return {"name": "p", "steps": [step | {"options": value}]}
    body: dict[str, Any] = {"messages": [said]}
    if name == "parameters":
        return body | {"tools": [{"type": "function", "function": {"name": "f", "parameters": value}}]}
    if name == "content":
        return {"messages": [{"role": "user", "content": value}]}
    if name == "tool_calls":
        return {"messages": [said, {"role": "assistant", "tool_calls": value}]}
    return body | {name: value}


@pytest.mark.parametrize("name", MOST)
def test_the_most_items_of_each_field(name: str) -> None:
    kind: type[Body] = PipelineBody if name in ("modules", "options", "steps") else ChatRequest

    def read(extra: int) -> Body:
        return read_body(kind, json.dumps(_longer(name, extra)).encode(), "application/json", 1 << 20)

    read(0)
    with pytest.raises(ValidationError, match=rf"has {MOST[name] + 1:,} items; {MOST[name]:,} are taken") as raised:
        read(1)
    assert raised.value.param is not None
    assert raised.value.param.endswith(name)


def _work(read: Callable[[], Any]) -> tuple[int, int]:
    """(calls of functions, most bytes held) while a body is read."""
    calls = 0

    def count(frame: Any, event: str, arg: Any) -> None:
        nonlocal calls
        calls += event in ("call", "c_call")

    tracemalloc.start()
    sys.setprofile(count)
    try:
        read()
    except DFastLLMError:
        pass
    finally:
        sys.setprofile(None)
        _, most = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    return calls, most


@pytest.mark.parametrize("bomb", BOMBS, ids=[bomb.name for bomb in BOMBS])
def test_reading_a_bomb_takes_no_more_work_than_its_bytes(bomb: Bomb, monkeypatch: pytest.MonkeyPatch) -> None:
    """With bounds of a 32nd part, bodies of a 32nd part are refused as whole ones are: neither the calls nor the memory
    of reading one twice as long again show its items."""
    monkeypatch.setattr(bounds, "TEXTS", bounds.TEXTS >> 5)
    kind = KINDS[bomb.path]
    for size in (1 << 18, 1 << 19):
        data = bomb.body(size)
        calls, most = _work(lambda data=data: read_body(kind, data, "application/json", VALUES >> 5))  # type: ignore[misc]
        assert calls < 1000, calls
        assert most < 6 * size, most / size


@pytest.fixture(scope="module")
def small() -> Iterator[Live]:
    limits = {"max_prompts": 8, "max_tokenize_length": 4096, "max_body_values": VALUES >> 5}
    with serving({"demo-ar": random_engine("llama", max_len=64)}, **limits) as running:
        yield running


@pytest.fixture(scope="module")
def http() -> Iterator[httpx.Client]:
    with httpx.Client(timeout=60, headers={"Content-Type": "application/json"}) as client:
        yield client


@pytest.fixture
def encoded(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Lengths of the texts that were encoded."""
    lengths: list[int] = []
    encode = Tokenizer.encode

    def seen(self: Tokenizer, text: str, **options: Any) -> list[int]:
        lengths.append(len(getattr(text, "text", text)))
        return encode(self, text, **options)

    monkeypatch.setattr(Tokenizer, "encode", seen)
    return lengths


@pytest.mark.parametrize("bomb", BOMBS, ids=[bomb.name for bomb in BOMBS])
def test_a_bomb_is_refused_before_it_is_encoded(
    small: Live, http: httpx.Client, encoded: list[int], bomb: Bomb, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(bounds, "TEXTS", bounds.TEXTS >> 5)
    answer = http.post(small.url + bomb.path, content=bomb.body(100_000))
    assert answer.status_code in bomb.statuses, answer.text
    assert len(answer.content) < 1000
    assert sum(encoded) <= 4096


def test_the_first_prompt_that_is_too_long_ends_the_encoding(small: Live, encoded: list[int]) -> None:
    long = "a" * 600  # the longest token has 8 characters, and the context 64 tokens
    answer = small.post("/v1/completions", {"prompt": ["a", "b", long, "c"], "max_tokens": 1})
    assert answer.status_code == 400
    assert answer.json()["error"]["code"] == "context_length_exceeded"
    assert encoded == [1, 1]
    answer = small.post("/v1/completions", {"prompt": ["a"] * 9, "max_tokens": 1})
    assert answer.status_code == 400
    assert "8 prompts" in answer.json()["error"]["message"]
    assert encoded == [1, 1]


def test_a_text_to_tokenise_has_its_own_bound(small: Live) -> None:
    """More than the context, which is what /tokenize is for."""
    assert small.post("/tokenize", {"prompt": "a" * 4096}).json()["count"] == 4096
    assert small.post("/tokenize", {"prompt": "a" * 4097}).status_code == 400
    chat = {"messages": [{"role": "user", "content": "a" * 4096}]}
    assert small.post("/tokenize", chat).status_code == 400  # with what the template adds
    assert small.post("/detokenize", {"tokens": [65] * 4096}).status_code == 200
    assert small.post("/detokenize", {"tokens": [65] * 4097}).status_code == 400


def test_a_name_that_is_no_unicode_is_an_unknown_field() -> None:
    for data, param in (
        (b'{"\\ud800": 1}', r"\ud800"),
        (b'{"messages": [{"role": "user", "content": "x", "\\ud800": 1}]}', r"messages.0.\ud800"),
    ):
        with pytest.raises(ValidationError, match=r"^Unknown field '\\\\ud800'") as raised:
            read_body(ChatRequest, data, "application/json", VALUES)
        assert raised.value.param == param


def test_what_clients_send_makes_no_series(small: Live, http: httpx.Client) -> None:
    """Methods, paths, models and ids of requests as they like: after a first round nothing new stands in /metrics."""

    def series() -> set[str]:
        return {line.rpartition(" ")[0] for line in small.get("/metrics").text.splitlines() if line[0] != "#"}

    def round(number: int) -> None:
        for method, path in ((f"M{number}", "/health"), ("GET", f"/p{number}"), ("DELETE", f"/v1/requests/r{number}")):
            http.request(method, small.url + path, headers={"X-Request-ID": f"id{number}"})
        for model in (f"m{number}", "demo-ar"):
            body = {"model": model, "prompt": "x", "max_tokens": 1, "seed": number, "user": f"u{number}"}
            http.post(small.url + "/v1/completions", json=body)
        http.get(small.url + f"/v1/models/m{number}")

    small.get("/metrics")
    round(0)
    before = series()
    for number in range(1, 20):
        round(number)
    assert series() == before
