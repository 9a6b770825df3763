"""An allow-list of adapters: a key that may use `a` alone gets `a`, and is refused `b` by its name as if there were
none, over chat, completions and WebSocket; the key of the same tenant without a list gets both."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.models import Decoder
from dfastllm.tenants.store import Store
from tests.kit.cheap_keys import cheap_keys
from tests.kit.live import Live, serving
from tests.kit.merged import write_strong
from tests.kit.served import random_engine
from tests.kit.sockets import socket

ASK: dict[str, Any] = {"max_tokens": 6, "temperature": 0, "ignore_eos": True}
WAYS: tuple[dict[str, Any], ...] = (
    {"model": "{}"},
    {"model": "base:{}"},
    {"model": "base", "lora": "{}"},
    {"model": "base", "adapter_id": "{}"},
)


@dataclass
class Served:
    live: Live
    keys: dict[str, str]

    def post(self, key: str, path: str, body: Any) -> httpx.Response:
        headers = {"Authorization": f"Bearer {self.keys[key]}"}
        return httpx.post(self.live.url + path, json=body, headers=headers, timeout=60)

    def completed(self, key: str, **more: Any) -> httpx.Response:
        return self.post(key, "/v1/completions", {**ASK, "prompt": "The dog", **more})

    def chatted(self, key: str, **more: Any) -> httpx.Response:
        return self.post(key, "/v1/chat/completions", {**ASK, "messages": [{"role": "user", "content": "dog"}], **more})


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    patched = pytest.MonkeyPatch()
    cheap_keys(patched)
    top: Path = tmp_path_factory.mktemp("allowed")
    store = Store(str(top / "tenants.db"), create=True)
    store.create_tenant("both", actor="cli:me")
    store.create_tenant("listed", actor="cli:me", adapters=["a"])
    keys = {
        "free": store.create_key("both", actor="cli:me")[1],
        "one": store.create_key("both", actor="cli:me", adapters=["a"])[1],
        "none": store.create_key("both", actor="cli:me", adapters=[])[1],
        "tenant": store.create_key("listed", actor="cli:me")[1],
        "wider": store.create_key("listed", actor="cli:me", adapters=["a", "b"])[1],
    }
    engine = random_engine("llama")
    assert isinstance(engine.model, Decoder)
    for seed, name in enumerate("ab"):
        write_strong(top / name, engine.model, seed, strength=2.0)
    modules = tuple(f"base:{name}={top / name}" for name in "ab")
    with serving({"base": engine}, tenants_db=str(top / "tenants.db"), lora_modules=modules) as live:
        yield Served(live, keys)
    store.close()
    patched.undo()


def named(way: dict[str, Any], adapter: str) -> dict[str, Any]:
    return {field: value.format(adapter) for field, value in way.items()}


def refused(reply: httpx.Response, adapter: str) -> None:
    """404 by the name that was asked for."""
    assert reply.status_code == 404, reply.text
    error = reply.json()["error"]
    assert error["code"] in ("model_not_found", "adapter_not_found"), error
    assert repr(adapter) in error["message"] or f"base:{adapter}" in error["message"], error


@pytest.mark.parametrize("way", WAYS, ids=str)
@pytest.mark.parametrize("key", ["one", "tenant", "wider"])
def test_a_list_of_one(served: Served, way: dict[str, Any], key: str) -> None:
    for ask in (served.completed, served.chatted):
        wanted, plain = ask("free", **named(way, "a")), ask("free", model="base")
        found = ask(key, **named(way, "a"))
        assert found.status_code == 200, found.text
        assert found.json()["choices"] == wanted.json()["choices"] != plain.json()["choices"]
        assert ask("free", **named(way, "b")).status_code == 200
        refused(ask(key, **named(way, "b")), "b")
        # An adapter that may not be used is told from one that is not there by nothing but its name.
        mine, nobodys = (ask(key, **named(way, name)).json()["error"] for name in ("b", "c"))
        assert {**mine, "message": mine["message"].replace("b", "c")} == {
            **nobodys,
            "message": nobodys["message"].replace("b", "c"),
        }


def test_an_empty_list_allows_none_and_the_base_stays(served: Served) -> None:
    assert served.completed("none", model="base").status_code == 200
    for way in WAYS:
        for name in "ab":
            refused(served.completed("none", **named(way, name)), name)


def test_what_is_listed_is_what_may_be_used(served: Served) -> None:
    for key, wanted in (
        ("free", {"base", "a", "b"}),
        ("one", {"base", "a"}),
        ("tenant", {"base", "a"}),
        ("none", {"base"}),
    ):
        headers = {"Authorization": f"Bearer {served.keys[key]}"}
        rows = httpx.get(f"{served.live.url}/v1/models", headers=headers, timeout=60).json()["data"]
        assert {row["id"].removeprefix("base:") for row in rows} == wanted


@pytest.mark.parametrize("key", ["one", "tenant", "wider"])
def test_over_a_websocket(served: Served, key: str) -> None:
    ask = {**ASK, "prompt": "The dog"}
    with socket(served.live, served.keys["free"]) as free, socket(served.live, served.keys[key]) as ws:
        for way in WAYS[:3]:
            wanted = free.result("generate", **ask, **named(way, "a"))
            assert ws.result("generate", **ask, **named(way, "a"))["text"] == wanted["text"]
            assert free.result("generate", **ask, **named(way, "b"))["text"] != wanted["text"]
            for stream in (False, True):
                told = ws.refusal("generate", **ask, **named(way, "b"), stream=stream)
                assert told["details"]["status"] == 404, told
                assert "'b'" in told["message"] or "base:b" in told["message"], told
