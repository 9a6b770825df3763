"""The reader of frames, on anything: a call, or a refusal with the id it can be told of. And what the document says."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from dfastllm.errors import DFastLLMError, NotReadyError, QueueFullError
from dfastllm.server.ws import protocol
from dfastllm.server.ws.functions import FUNCTIONS, Incoming, Refused, read_call
from dfastllm.server.ws.protocol import CLOSES, Code, error_info
from tests.kit.source import ROOT

VALUES = 4096
TEXT = st.text(max_size=12)
JSON: Any = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | TEXT,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(TEXT, inner, max_size=4),
    max_leaves=12,
)
NAMES = st.sampled_from(["id", "function", "params", "tenant_id", "type", "api_key"]) | TEXT
IDS = st.text(min_size=1, max_size=130) | JSON
FUNCTION = st.sampled_from([*FUNCTIONS, "embed"]) | JSON
FRAMES = st.fixed_dictionaries({}, optional={"id": IDS, "function": FUNCTION, "params": JSON, "tenant_id": JSON})
KNOWN = st.sampled_from(["prompt", "messages", "model", "max_tokens", "stream", "stop", "n"])
PARAMS = st.dictionaries(KNOWN | TEXT, JSON)


def read(data: bytes) -> Incoming | Refused:
    try:
        return read_call(data, VALUES)
    except Refused as refused:
        result = refused
    info = error_info(result.error, result.code)
    assert info.message
    assert 400 <= result.error.status < 500
    json.loads(info.model_dump_json())
    return result


@settings(max_examples=100, deadline=None)
@given(st.binary(max_size=200))
def test_any_bytes(data: bytes) -> None:
    assert isinstance(read(data), Refused)


@settings(max_examples=100, deadline=None)
@given(FRAMES | st.dictionaries(NAMES, JSON, max_size=5) | JSON)
def test_any_json(frame: Any) -> None:
    result = read(json.dumps(frame).encode())
    id = frame.get("id") if isinstance(frame, dict) else None
    told = id if isinstance(id, str) and 1 <= len(id) <= 128 else None
    if isinstance(result, Refused):
        # json.dumps writes NaN and lone surrogates, which are read as they are or not at all.
        assert result.id in (told, None)
    else:
        assert result.frame.id == told
        assert result.function is FUNCTIONS[frame["function"]]


@settings(max_examples=60, deadline=None)
@given(PARAMS)
def test_any_params_of_generate(params: dict[str, Any]) -> None:
    result = read(json.dumps({"id": "1", "function": "generate", "params": params}).encode())
    if isinstance(result, Incoming):
        given_names = {name for name, value in params.items() if value is not None}
        assert given_names <= set(type(result.params).model_fields)
        assert ("messages" in given_names) is not ("prompt" in given_names)
    else:
        assert result.id == "1"


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 400), st.binary(min_size=1, max_size=3))
def test_a_call_that_was_damaged(at: int, damage: bytes) -> None:
    whole = json.dumps(
        {"id": "1", "function": "generate", "params": {"prompt": "hello", "stop": ["a", "b"], "n": 2}}
    ).encode()
    at %= len(whole)
    result = read(whole[:at] + damage + whole[at + len(damage) :])
    assert isinstance(result, Incoming | Refused)


@pytest.mark.parametrize("cut", range(0, 60, 7))
def test_a_call_that_was_cut(cut: int) -> None:
    whole = json.dumps({"id": "1", "function": "health", "params": {}}).encode()
    assert isinstance(read(whole), Incoming)
    assert isinstance(read(whole[: min(cut, len(whole) - 1)]), Refused)


def test_codes() -> None:
    codes: dict[int, Code] = {
        400: "INVALID_PARAMS",
        401: "UNAUTHORIZED",
        403: "UNAUTHORIZED",
        404: "INVALID_PARAMS",
        413: "INVALID_PARAMS",
        429: "RATE_LIMIT_EXCEEDED",
        500: "INTERNAL_ERROR",
        503: "DISPATCH_ERROR",
        504: "INTERNAL_ERROR",
    }
    for status, code in codes.items():
        error = DFastLLMError("x")
        error.status = status
        assert error_info(error).code == code
    assert error_info(QueueFullError("x", retry_after=2.5)).retry_after == 2.5
    assert error_info(NotReadyError("x")).retry_after == 1.0
    assert "retry_after" not in error_info(DFastLLMError("x")).model_dump(exclude_unset=True)


def test_the_document_names_every_frame_and_code() -> None:
    page = (ROOT / "docs" / "websocket.md").read_text(encoding="utf-8")
    for frame in (*protocol.CLIENT_FRAMES, *protocol.SERVER_FRAMES, protocol.TokenData, protocol.CanvasData):
        for name in frame.model_fields:
            assert re.search(rf"\b{name}\b", page), f"{frame.__name__}.{name}"
    for code in CLOSES:
        assert str(code) in page
    for function in FUNCTIONS:
        assert f"`{function}`" in page
    assert all(issubclass(frame, BaseModel) for frame in protocol.SERVER_FRAMES)
