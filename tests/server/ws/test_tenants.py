"""Tenants over /ws, with the database that a server has: limits, models, usage and keys are those of HTTP."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.tenants.store import Store
from tests.kit.cheap_keys import cheap_keys
from tests.kit.live import Live, serving
from tests.kit.served import random_engine, slow
from tests.kit.sockets import Socket, socket
from tests.server.test_lifecycle import idle, until

ASK: dict[str, Any] = {"model": "causal", "prompt": "abc", "max_tokens": 4, "ignore_eos": True}


@dataclass
class Served:
    live: Live
    store: Store
    keys: dict[str, str]

    @contextlib.contextmanager
    def connected(self, tenant: str) -> Iterator[Socket]:
        """Over the exchange of a key, as browsers do."""
        with socket(self.live, opened=False) as ws:
            assert ws.receive() == {"type": "auth_required"}
            ws.send({"type": "auth", "api_key": self.keys[tenant]})
            tenant_id = self.store.tenant(tenant).id
            assert ws.receive() == {"type": "auth_success", "tenant_id": tenant_id}
            assert ws.receive()["tenant_id"] == tenant_id
            yield ws

    def used(self, tenant: str) -> tuple[int, int, int, int]:
        """Requests that ended well and not, prompt and completion tokens."""
        headers = {"Authorization": f"Bearer {self.keys[tenant]}"}
        (row,) = httpx.get(f"{self.live.url}/v1/usage", headers=headers, timeout=60).json()["data"]
        return row["ok"], row["cancelled"] + row["failed"], row["prompt_tokens"], row["completion_tokens"]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    patched = pytest.MonkeyPatch()
    cheap_keys(patched)
    file: Path = tmp_path_factory.mktemp("tenants") / "tenants.db"
    store = Store(str(file), create=True)
    store.create_tenant("free", actor="cli:me")
    store.create_tenant("narrow", actor="cli:me", models=["canvas"])
    store.create_tenant("limited", actor="cli:me", requests_per_minute=2)
    names = ("free", "narrow", "limited")
    keys = {name: store.create_key(name, actor="cli:me", scopes=["generate", "usage"])[1] for name in names}
    engines = {"causal": slow(random_engine("llama"), 0.01), "canvas": random_engine("llada")}
    with serving(engines, tenants_db=str(file)) as live:
        yield Served(live, store, keys)
    store.close()
    patched.undo()


def test_a_key_of_nobody(served: Served) -> None:
    with socket(served.live, opened=False) as ws:
        ws.receive()
        ws.send({"type": "auth", "api_key": served.keys["free"][:-1] + "0"})
        assert ws.receive()["type"] == "auth_failed"
        assert ws.close_code() == 1008


def test_limits_of_a_tenant(served: Served) -> None:
    with served.connected("limited") as ws:
        for _ in range(2):
            assert ws.result("generate", **ASK)["tokens_generated"] == 4
        refused = ws.refusal("generate", **ASK)
        assert (refused["code"], refused["details"]["code"]) == ("RATE_LIMIT_EXCEEDED", "rate_limit_exceeded")
        assert 50 <= refused["retry_after"] <= 60
        assert ws.refusal("generate", **ASK, stream=True)["code"] == "RATE_LIMIT_EXCEEDED"
        assert ws.result("health")["status"] == "ready"
    assert served.used("limited") == (2, 0, 6, 8)


def test_a_model_that_is_not_allowed_is_not_there(served: Served) -> None:
    with served.connected("narrow") as ws:
        assert ws.result("health")["models"] == ["canvas"]
        refused = ws.refusal("generate", **ASK)
        assert (refused["code"], refused["details"]["status"]) == ("INVALID_PARAMS", 404)
        assert ws.result("generate", **{**ASK, "model": "canvas"})["tokens_generated"] == 4


def test_another_tenant_cannot_end_a_call(served: Served) -> None:
    with served.connected("free") as ws:
        ws.send({"id": "1", "function": "generate", "params": {**ASK, "max_tokens": 60}})
        assert until(lambda: bool(served.live.serving.jobs))
        (id,) = served.live.serving.jobs
        url = f"{served.live.url}/v1/requests/{id}"
        other = {"Authorization": f"Bearer {served.keys['narrow']}"}
        assert httpx.delete(url, headers=other, timeout=60).status_code == 404
        with served.connected("narrow") as theirs:
            assert theirs.refusal("cancel", id="1")["details"]["status"] == 404
        assert ws.until_end("1")[-1]["status"] == "complete"


def test_usage_of_a_lost_connection_is_what_was_sent(served: Served) -> None:
    """At least the tokens that the client got, and not those that it never could have."""
    before = served.used("free")
    with served.connected("free") as ws:
        ws.send({"id": "1", "function": "generate", "params": {**ASK, "max_tokens": 400, "stream": True}})
        got = sum(ws.receive()["data"]["tokens"] for _ in range(5))
        ws.ws.socket.close()
    assert until(lambda: idle(served.live))
    assert until(lambda: served.used("free")[1] == before[1] + 1)
    assert got <= served.used("free")[3] - before[3] < 300


def test_a_disabled_key_gets_no_more_calls(served: Served) -> None:
    tenants = served.live.serving.tenants
    assert tenants is not None
    key, text = tenants.create_key("free", actor="cli:me", scopes=["generate"])
    with socket(served.live, text) as ws:
        assert ws.result("generate", **ASK)
        tenants.disable_key(key.id, actor="cli:me")
        assert ws.refusal("generate", **ASK)["code"] == "UNAUTHORIZED"
        assert ws.close_code() == 1008
