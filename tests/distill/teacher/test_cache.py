"""Entries are whole, are found by what was asked, and are not trusted when they are damaged."""

from __future__ import annotations

import itertools
import json
import os
from pathlib import Path
from typing import Any

import pytest

from dfastllm.distill.teacher.cache import AnswerCache, request_key
from dfastllm.errors import StorageError

ASKED: dict[str, Any] = {
    "model": "m",
    "messages": [{"role": "user", "content": "Grüße"}],
    "tools": [],
    "params": {"max_tokens": 5, "temperature": 0.0},
}
ANSWER = {"choices": [{"message": {"content": "hé\ud800"}}], "usage": {"prompt_tokens": 3}}


def test_the_key_is_of_everything_that_was_asked_and_of_nothing_else() -> None:
    changes: list[dict[str, Any]] = [
        {},
        {"model": "n"},
        {"messages": [{"role": "user", "content": "Grüsse"}]},
        {"messages": [{"role": "system", "content": "Grüße"}]},
        {"tools": [{"type": "function", "function": {"name": "f"}}]},
        {"params": {"max_tokens": 6, "temperature": 0.0}},
        {"params": {"max_tokens": 5, "temperature": 0.0, "top_p": 1}},
    ]
    keys = [request_key(**{**ASKED, **change}) for change in changes]
    assert len(set(keys)) == len(keys)
    for one in itertools.permutations(ASKED["params"].items()):
        assert request_key(**{**ASKED, "params": dict(one)}) == keys[0]
    assert set(map(len, keys)) == {64}


def test_an_answer_comes_back_as_it_was(tmp_path: Path) -> None:
    cache, key = AnswerCache(tmp_path / "deep" / "cache"), request_key(**ASKED)
    assert cache.get(key) is None
    cache.put(key, ANSWER)
    assert cache.get(key) == ANSWER
    assert [path.name for path in cache.directory.rglob("*") if path.is_file()] == [f"{key}.json"]
    assert cache.damaged == 0


def test_a_damaged_entry_is_as_none_and_is_made_again(tmp_path: Path) -> None:
    cache, key = AnswerCache(tmp_path), request_key(**ASKED)
    cache.put(key, ANSWER)
    path = cache.path(key)
    sound = path.read_bytes()
    entry = json.loads(sound)
    entry["response"]["usage"]["prompt_tokens"] = 4
    wrong = [
        b"",
        sound[: len(sound) // 2],
        b"[]",
        b"null",
        b"\xff\xfe",
        b"[" * 100_000,
        json.dumps(entry).encode(),
        sound.replace(key.encode(), b"0" * 64),
        sound.replace(b'"version": 1', b'"version": 2'),
        sound.replace(b'"sha256"', b'"sha255"'),
    ]
    for at, data in enumerate(wrong):
        path.write_bytes(data)
        assert cache.get(key) is None, data[:60]
        assert cache.damaged == at + 1
        cache.put(key, ANSWER)
        assert cache.get(key) == ANSWER


def test_half_an_entry_is_never_seen(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the last step fails there is no entry and no rubbish; the old entry stays."""
    cache, key = AnswerCache(tmp_path), request_key(**ASKED)
    cache.put(key, ANSWER)

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "replace", full)
    with pytest.raises(StorageError, match="cannot be written"):
        cache.put(key, {"choices": []})
    assert cache.get(key) == ANSWER
    assert [path.name for path in tmp_path.rglob("*") if path.is_file()] == [f"{key}.json"]
