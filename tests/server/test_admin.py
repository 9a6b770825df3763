"""The admin API on a live server: every answer is held against openapi.json as well (tests/kit/live)."""

from __future__ import annotations

import json
import threading
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.tenants import SCOPES, records
from dfastllm.tenants.store import Store
from dfastllm.tenants.tables import USAGE
from tests.kit.cheap_keys import cheap_keys
from tests.kit.live import Live, serving
from tests.kit.served import parrot_engine


@dataclass
class Admin:
    """A server with a database of tenants, and an admin's key."""

    live: Live
    store: Store
    key: str

    def call(self, method: str, path: str, body: Any = None, key: str | None = None) -> httpx.Response:
        headers = {"Authorization": f"Bearer {key or self.key}"}
        return httpx.request(method, f"{self.live.url}{path}", json=body, headers=headers, timeout=60)

    def good(self, method: str, path: str, body: Any = None) -> Any:
        response = self.call(method, path, body)
        assert response.status_code == 200, response.text
        return response.json()

    def refusal(self, method: str, path: str, body: Any = None, key: str | None = None) -> tuple[int, str, str | None]:
        response = self.call(method, path, body, key)
        error = response.json()["error"]
        return response.status_code, error["code"], error["param"]


@pytest.fixture(scope="module")
def admin(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Admin]:
    patched = pytest.MonkeyPatch()
    cheap_keys(patched)
    file: Path = tmp_path_factory.mktemp("admin") / "tenants.db"
    store = Store(str(file), create=True)
    store.create_tenant("operators", actor="cli:me")
    _, key = store.create_key("operators", actor="cli:me", scopes=["admin"])
    with serving({"parrot": parrot_engine()}, tenants_db=str(file)) as running:
        yield Admin(running, store, key)
    store.close()
    patched.undo()


def test_a_tenant_from_beginning_to_end(admin: Admin) -> None:
    body = {"name": "acme", "weight": 2, "requests_per_minute": 60, "tokens_per_minute": None, "models": ["parrot"]}
    made = admin.good("POST", "/admin/v1/tenants", body)
    assert made == {
        "object": "tenant",
        "id": made["id"],
        "name": "acme",
        "weight": 2.0,
        "requests_per_minute": 60,
        "tokens_per_minute": None,
        "max_concurrent": None,
        "priority_min": 0,
        "models": ["parrot"],
        "adapters": None,
        "disabled": False,
    }
    assert admin.store.tenant("acme").id == made["id"]
    assert admin.good("GET", f"/admin/v1/tenants/{made['id']}") == admin.good("GET", "/admin/v1/tenants/acme") == made
    change = {"requests_per_minute": "none", "models": "all", "adapters": [], "tokens_per_minute": 100, "name": "acme2"}
    changed = admin.good("POST", "/admin/v1/tenants/acme", change)
    assert changed == made | {
        "requests_per_minute": None,
        "models": None,
        "adapters": [],
        "tokens_per_minute": 100,
        "name": "acme2",
    }
    assert changed in admin.good("GET", "/admin/v1/tenants")["data"]
    assert admin.good("POST", "/admin/v1/tenants/acme2", {"disabled": True})["disabled"]
    assert admin.good("POST", "/admin/v1/tenants/acme2", {}) == changed | {"disabled": True}


def test_a_key_is_in_one_answer_only(admin: Admin) -> None:
    admin.good("POST", "/admin/v1/tenants", {"name": "keyed"})
    fields = {"tenant": "keyed", "scopes": ["generate", "usage"], "note": "shop", "expires": 4_000_000_000}
    response = admin.call("POST", "/admin/v1/keys", fields)
    assert response.headers["cache-control"] == "no-store"
    made = response.json()
    text = made.pop("key")
    assert made["scopes"] == ["generate", "usage"]
    assert (made["note"], made["expires"], made["disabled"]) == ("shop", 4_000_000_000, False)
    assert admin.good("GET", "/admin/v1/keys?tenant=keyed")["data"] == [made]
    assert admin.call("GET", "/v1/usage", key=text).status_code == 200
    rotated = admin.good("POST", f"/admin/v1/keys/{made['id']}/rotate", {"grace": 100})
    assert admin.call("GET", "/v1/usage", key=rotated["key"]).status_code == 200
    assert admin.call("GET", "/v1/usage", key=text).status_code == 200, "within its grace"
    assert admin.good("DELETE", f"/admin/v1/keys/{made['id']}")["disabled"]
    assert admin.refusal("GET", "/v1/usage", key=text) == (401, "invalid_api_key", None), "at once, here"
    everything = json.dumps([admin.good("GET", "/admin/v1/keys"), admin.good("GET", "/admin/v1/audit")])
    for secret in (text, rotated["key"], admin.key):
        assert secret.split("_")[2] not in everything


def test_long_lists_are_written_off_the_event_loop(admin: Admin, monkeypatch: pytest.MonkeyPatch) -> None:
    threads: list[str] = []
    for name in ("key_record", "tenant_record", "usage_record"):
        inner = getattr(records, name)

        def noting(*given: Any, inner: Callable[..., Any] = inner) -> Any:
            threads.append(threading.current_thread().name)
            return inner(*given)

        monkeypatch.setattr(records, name, noting)
    row = {"request_id": "r", "tenant_id": "t", "key_id": "k", "model": "m", "adapter": "", "prompt_tokens": 1}
    row |= {"completion_tokens": 1, "version": 1, "writer": "w", "id": "off", "status": "ok", "started": 1e9}
    with admin.store.database.writing() as connection:
        connection.execute(USAGE.insert(), {**row, "seconds": 1.0})
    counts = [len(admin.good("GET", f"/admin/v1/{what}")["data"]) for what in ("keys", "tenants", "usage")]
    with admin.store.database.writing() as connection:
        connection.execute(USAGE.delete().where(USAGE.c.id == "off"))
    assert all(counts)
    assert len(threads) == sum(counts)
    assert {name.partition("_")[0] for name in threads} == {"asyncio"}, "of the loop's pool"


def test_who_may(admin: Admin) -> None:
    """Every route, with a key of every scope and without one."""
    admin.good("POST", "/admin/v1/tenants", {"name": "who"})
    _, victim = admin.store.create_key("who", actor="me")
    everywhere = [
        (method.upper(), path)
        for path, methods in admin.live.app.openapi()["paths"].items()
        for method in methods
        if path.startswith("/admin/v1/")
    ]
    assert len(everywhere) == 11
    bodies = {"/admin/v1/tenants": {"name": "x"}, "/admin/v1/keys": {"tenant": "who"}}
    _, key = admin.store.create_key("who", actor="me", scopes=[scope for scope in SCOPES if scope != "admin"])
    for method, path in everywhere:
        named = path.format(tenant="who", key=victim.split("_")[1])
        body = bodies.get(path, {}) if method == "POST" else None
        assert admin.refusal(method, named, body, key="dfk_wrong") == (401, "invalid_api_key", None)
        assert httpx.request(method, admin.live.url + named, json=body, timeout=60).status_code == 401
        assert admin.refusal(method, named, body, key=key) == (403, "forbidden", None)
    _, key = admin.store.create_key("who", actor="me", scopes=["admin"])
    assert admin.refusal("GET", "/v1/usage", key=key) == (403, "forbidden", None)
    assert not admin.store.key(victim.split("_")[1]).disabled
    assert {key.tenant_id for key in admin.store.keys("who")} == {admin.store.tenant("who").id}
    assert "x" not in [tenant.name for tenant in admin.store.tenants()]


def test_usage(admin: Admin) -> None:
    rich = admin.good("POST", "/admin/v1/tenants", {"name": "rich"})["id"]
    poor = admin.good("POST", "/admin/v1/tenants", {"name": "poor"})["id"]
    _, key = admin.store.create_key("poor", actor="me", scopes=["usage"])
    row = {"request_id": "r", "key_id": "k", "model": "parrot", "adapter": "", "version": 1, "writer": "w"}
    row |= {"status": "ok", "seconds": 0.5, "started": 1e9, "prompt_tokens": 2}
    rows = [
        row | {"id": f"{i}", "tenant_id": t, "completion_tokens": n} for i, (t, n) in enumerate([(rich, 9), (poor, 4)])
    ]
    with admin.store.database.writing() as connection:
        connection.execute(USAGE.insert(), rows)
    sums = {"requests": 1, "ok": 1, "cancelled": 0, "failed": 0, "prompt_tokens": 2, "seconds": 0.5}
    old = "since=2001-01-01&until=2002-01-01"
    assert admin.good("GET", f"/admin/v1/usage?{old}") == {
        "object": "list",
        "since": 978_307_200,
        "until": 1_009_843_200,
        "data": [
            {"tenant": "rich", "completion_tokens": 9, **sums},
            {"tenant": "poor", "completion_tokens": 4, **sums},
        ],
    }
    (line,) = admin.good("GET", f"/admin/v1/usage?{old}&tenant=rich&by=model&by=adapter")["data"]
    assert line == {"model": "parrot", "adapter": "", "completion_tokens": 9, **sums}
    own = admin.call("GET", f"/v1/usage?{old}", key=key).json()["data"]
    assert own == [{"model": "parrot", "completion_tokens": 4, **sums}], "only its own tenant's"


def test_the_audit_log(admin: Admin) -> None:
    tenant = admin.good("POST", "/admin/v1/tenants", {"name": "seen", "max_concurrent": 2})
    (line,) = admin.good("GET", "/admin/v1/audit?limit=1")["data"]
    assert line == {
        "at": line["at"],
        "actor": f"key:{admin.key.split('_')[1]}",
        "action": "tenant.create",
        "target": tenant["id"],
        "detail": '{"name": "seen", "max_concurrent": 2}',
    }


@pytest.mark.parametrize(
    ("method", "path", "body", "status", "code", "param"),
    [
        ("POST", "tenants", {"name": "operators"}, 400, "invalid_request", "name"),
        ("POST", "tenants", {"name": "a b"}, 400, "invalid_request", "name"),
        ("POST", "tenants", {}, 400, "invalid_request", "name"),
        ("POST", "tenants", {"name": "x", "wait": 2}, 400, "unsupported", "wait"),
        ("POST", "tenants", {"name": "x", "weight": 0}, 400, "invalid_request", "weight"),
        ("POST", "tenants", {"name": "x", "max_concurrent": "2"}, 400, "invalid_request", "max_concurrent"),
        ("POST", "tenants", {"name": "x", "models": [""]}, 400, "invalid_request", "models.0"),
        ("POST", "tenants/nobody", {"weight": 2}, 404, "tenant_not_found", "tenant"),
        ("GET", "tenants/nobody", None, 404, "tenant_not_found", "tenant"),
        ("POST", "keys", {"tenant": "nobody"}, 404, "tenant_not_found", "tenant"),
        ("POST", "keys", {"tenant": "operators", "scopes": ["fly"]}, 400, "invalid_request", "scopes.0"),
        ("POST", "keys", {"tenant": "operators", "scopes": []}, 400, "invalid_request", "scopes"),
        ("POST", "keys", {"tenant": "operators", "expires": 5}, 400, "invalid_request", "expires"),
        ("POST", "keys/nothing/rotate", {}, 404, "key_not_found", "key"),
        ("DELETE", "keys/nothing", None, 404, "key_not_found", "key"),
        ("GET", "keys?tenant=nobody", None, 404, "tenant_not_found", "tenant"),
        ("GET", "usage?since=yesterday", None, 400, "invalid_request", "since"),
        ("GET", "usage?by=colour", None, 400, "invalid_request", "by.0"),
        ("GET", "usage?tenant=nobody", None, 404, "tenant_not_found", "tenant"),
        ("GET", "audit?limit=0", None, 400, "invalid_request", "limit"),
        ("GET", "audit?limit=%C2%B2", None, 400, "invalid_request", "limit"),
        ("GET", f"usage?since={'7' * 81}", None, 400, "invalid_request", "since"),
        ("GET", "usage?by=model&by=model&by=model&by=key&by=key", None, 400, "invalid_request", "by"),
    ],
)
def test_what_is_refused(admin: Admin, method: str, path: str, body: Any, status: int, code: str, param: str) -> None:
    assert admin.refusal(method, f"/admin/v1/{path}", body) == (status, code, param)


def test_a_method_that_is_not_taken_hears_of_those_that_are(admin: Admin) -> None:
    for path, methods in (("tenants", "GET, POST"), ("tenants/x", "GET, POST"), ("keys/x", "DELETE")):
        refused = admin.call("PUT", f"/admin/v1/{path}")
        assert (refused.status_code, refused.headers["allow"]) == (405, methods)


def test_a_server_without_tenants_has_no_such_route() -> None:
    with serving({"parrot": parrot_engine()}, api_key="secret") as running:
        for path in ("/admin/v1/tenants", "/v1/usage"):
            answer = running.get(path, headers={"Authorization": "Bearer secret"})
            assert answer.status_code == 404
            assert path not in running.app.openapi()["paths"]
