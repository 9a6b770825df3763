"""Who may ask for what, over real HTTP on a server with tenants: keys and scopes by path, allow-lists, limits before
the engine, cancelling, priorities, salts, metrics with bounded labels; each middleware on scopes of other types."""

from __future__ import annotations

import ast
import asyncio
import json
import threading
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.core import Request
from dfastllm.metrics.tenants import OTHER, TenantMetrics
from dfastllm.server.access import PATHS, Access, Keys, scope_of
from dfastllm.server.app import create_app
from dfastllm.server.middleware import BodyLimit, Head, Trace
from dfastllm.settings import Settings
from dfastllm.tenants import ANYONE, OWNER, SCOPES
from dfastllm.tenants.store import Store
from tests.kit.cheap_keys import cheap_keys
from tests.kit.live import Live, serving
from tests.kit.served import random_engine, slow

OWN = "the-server-s-own-key"


@dataclass
class Served:
    """Two models behind tenants: `free` may use both, `narrow` only `causal` and few at once; keys by name."""

    live: Live
    store: Store
    keys: dict[str, str]
    http: httpx.Client

    def ask(self, key: str, method: str, path: str, body: Any = None, **headers: str) -> httpx.Response:
        named = self.keys.get(key, key)
        sent = {"Authorization": f"Bearer {named}", **{k.replace("_", "-"): v for k, v in headers.items()}}
        return self.http.request(method, self.live.url + path, json=body, headers=sent)

    def complete(self, key: str, **body: Any) -> httpx.Response:
        asked = {"model": "causal", "prompt": "abc", "max_tokens": 4, "ignore_eos": True, **body}
        return self.ask(key, "POST", "/v1/completions", asked)

    def used(self, tenant: str) -> list[dict[str, Any]]:
        """Rows of /admin/v1/usage, once nothing runs any more."""
        end = time.monotonic() + 10
        while time.monotonic() < end:
            rows = self.ask("admin", "GET", f"/admin/v1/usage?tenant={tenant}&by=model").json()["data"]
            if all(row["requests"] == row["ok"] + row["cancelled"] + row["failed"] for row in rows):
                break
            time.sleep(0.02)
        return list(rows)


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    patched = pytest.MonkeyPatch()
    cheap_keys(patched)
    file: Path = tmp_path_factory.mktemp("access") / "tenants.db"
    store = Store(str(file), create=True)
    store.create_tenant("free", actor="cli:me", weight=2.0)
    store.create_tenant("narrow", actor="cli:me", models=["causal"], priority_min=3)
    store.create_tenant("limited", actor="cli:me", requests_per_minute=3, tokens_per_minute=200, max_concurrent=2)
    keys = {
        "admin": store.create_key("free", actor="cli:me", scopes=["admin"])[1],
        "free": store.create_key("free", actor="cli:me")[1],
        "narrow": store.create_key("narrow", actor="cli:me", scopes=["generate", "usage"])[1],
        "limited": store.create_key("limited", actor="cli:me")[1],
        "metrics": store.create_key("free", actor="cli:me", scopes=["metrics"])[1],
        "blocks": store.create_key("free", actor="cli:me", models=["canvas"])[1],
    }
    engines = {"causal": slow(random_engine("llama", prefill_chunk=32), 0.003), "canvas": random_engine("llada")}
    with serving(engines, tenants_db=str(file), api_key=OWN) as live, httpx.Client(timeout=60) as http:
        yield Served(live, store, keys, http)
    store.close()
    patched.undo()


@pytest.fixture
def reached(served: Served, monkeypatch: pytest.MonkeyPatch) -> list[Request]:
    """What reaches the engine."""
    seen: list[Request] = []
    submit = served.live.worker.submit

    def watched(model: str, asked: Any) -> Any:
        seen.append(asked.request)
        return submit(model, asked)

    monkeypatch.setattr(served.live.worker, "submit", watched)
    return seen


def error(response: httpx.Response) -> tuple[int, str]:
    return response.status_code, response.json()["error"]["code"]


def test_every_path_wants_its_scope(served: Served) -> None:
    """Each route of the application with each key that has one scope: let in exactly where the table says so."""
    keys = {scope: served.store.create_key("free", actor="cli:me", scopes=[scope])[1] for scope in SCOPES}
    routes: list[Any] = list(served.live.app.routes)
    paths = [(m, r.path) for r in routes for m in getattr(r, "methods", ()) or () if m != "HEAD"]
    assert len(paths) > 25
    for method, template in paths:
        path = "/" if template == "/" else template.split("{")[0].rstrip("/") + ("/x" if "{" in template else "")
        wanted = scope_of(path, tenants=True)
        for scope, key in keys.items():
            status = served.ask(key, method, path).status_code
            assert (status == 403) == (wanted not in (None, scope)), (method, path, scope, status)
        status = served.ask("dfk_none_ofthese", method, path).status_code
        assert (status == 401) == (wanted is not None), (method, path, status)
        status = served.http.request(method, served.live.url + path).status_code
        assert (status == 401) == (wanted is not None), (method, path, status)


def test_a_path_that_nobody_thought_of_wants_a_key() -> None:
    assert scope_of("/v1/new", tenants=False) == scope_of("/healthy", tenants=True) == "generate"
    assert scope_of("/health/x", tenants=True) is scope_of("/", tenants=True) is None
    assert scope_of("/metrics", tenants=False) is None
    assert scope_of("/metrics", tenants=True) == "metrics"
    assert {scope for _, scope in PATHS if scope is not None} <= SCOPES.keys()


def test_the_server_s_own_key_goes_on(served: Served, reached: list[Request]) -> None:
    assert served.complete(OWN).status_code == 200
    assert served.ask(OWN, "GET", "/admin/v1/tenants").status_code == 200
    assert [(r.tenant, r.tenant_salt) for r in reached] == [("default", "")]


def test_a_model_that_is_not_allowed_is_not_there(served: Served, reached: list[Request]) -> None:
    there = served.complete("narrow", model="nowhere")
    hidden = served.complete("narrow", model="canvas")
    assert error(there) == error(hidden) == (404, "model_not_found")
    assert there.text.replace("nowhere", "canvas") == hidden.text
    assert "canvas" in served.complete("free", model="nowhere").json()["error"]["message"]
    assert served.complete("narrow", model=None).status_code == 200  # the only one that it has
    assert served.complete("free", model=None).status_code == 400
    for path in ("/v1/models/canvas", "/v1/models/nowhere"):
        assert served.ask("narrow", "GET", path).status_code == 404
    for key, names in (("narrow", ["causal"]), ("blocks", ["canvas"]), ("free", ["causal", "canvas"])):
        assert [card["id"] for card in served.ask(key, "GET", "/v1/models").json()["data"]] == names
    assert served.ask("narrow", "POST", "/tokenize", {"model": "canvas", "prompt": "x"}).status_code == 404
    assert served.ask("narrow", "POST", "/detokenize", {"model": "canvas", "tokens": [1]}).status_code == 404
    assert "models" not in httpx.get(served.live.url + "/health/ready").json()
    assert len(reached) == 1


def test_what_a_request_is_to_the_engine(served: Served, reached: list[Request]) -> None:
    """Whose it is, with which share and salt, comes from the key; a priority is raised to what the tenant may have."""
    served.complete("free", priority=-7)
    served.complete("narrow", priority=-7)
    served.complete("narrow", priority=9, cache_salt="mine")
    ids = {name: served.store.tenant(name).id for name in ("free", "narrow")}
    seen = [(r.tenant, r.share, r.priority, r.cache_salt) for r in reached]
    free, narrow = (ids["free"], 2.0), (ids["narrow"], 1.0)
    assert seen == [(*free, 0, ""), (*narrow, 3, ""), (*narrow, 9, "mine")]
    assert reached[1].tenant_salt == reached[2].tenant_salt == served.store.salt(ids["narrow"])
    assert reached[0].tenant_salt not in ("", reached[1].tenant_salt)
    # A model that shares nothing takes the tenant's salt, and still refuses a demand to share by one.
    assert served.complete("free", model="canvas").status_code == 200
    assert error(served.complete("free", model="canvas", cache_salt="x")) == (400, "unsupported")


def test_beginnings_are_shared_within_a_tenant_only(served: Served) -> None:
    prompt = "a beginning that is long enough to fill some pages of keys and values " * 2

    def cached(key: str, **body: Any) -> int:
        usage = served.complete(key, prompt=prompt, max_tokens=1, **body).json()["usage"]
        return int(usage["prompt_tokens_details"]["cached_tokens"])

    assert cached("free") == 0
    assert cached("free") > 32
    assert cached("narrow") == 0
    salt = served.store.salt(served.store.tenant("free").id)
    assert cached("narrow", cache_salt=salt) == 0  # even who knew it
    assert cached("narrow", cache_salt=repr((salt, ""))) == 0
    assert cached(OWN, cache_salt=salt) == 0


def test_limits_are_asked_before_the_engine(served: Served, reached: list[Request]) -> None:
    """Requests and tokens a minute and requests at once; over the whole of a call with its choices."""
    impossible = served.complete("limited", max_tokens=100, n=2)
    assert error(impossible) == (400, "invalid_request")
    assert impossible.json()["error"]["param"] == "max_tokens"
    assert served.complete("limited", max_tokens=50, n=2).status_code == 200  # 3 + 100, which is what it took
    refused = served.complete("limited", max_tokens=100)
    assert error(refused) == (429, "rate_limit_exceeded")
    assert 50 <= int(refused.headers["Retry-After"]) <= 60
    assert len(reached) == 2
    statuses: list[int] = []

    def ask() -> None:
        statuses.append(served.complete("limited", max_tokens=20).status_code)

    threads = [threading.Thread(target=ask) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(statuses) == [200, 200, 429, 429]  # at most three a minute, two at once
    rows = served.used("limited")
    assert sum(row["ok"] for row in rows) == 3
    assert rows[0]["prompt_tokens"] == 9
    assert rows[0]["completion_tokens"] == 140
    assert served.live.metric("tenant_refused_total", tenant="limited") == 3


def test_only_one_s_own_requests_are_cancelled(served: Served) -> None:
    with httpx.stream(
        "POST",
        served.live.url + "/v1/completions",
        json={"model": "causal", "prompt": "abc", "max_tokens": 400, "ignore_eos": True, "stream": True},
        headers={"Authorization": f"Bearer {served.keys['free']}", "X-Request-ID": "shared-name"},
        timeout=60,
    ) as stream:
        lines = stream.iter_lines()
        first = json.loads(next(line for line in lines if line)[6:])
        for name in (first["id"], "shared-name"):
            strange = served.ask("narrow", "DELETE", f"/v1/requests/{name}")
            nobody = served.ask("narrow", "DELETE", "/v1/requests/nobody-s")
            assert error(strange) == error(nobody) == (404, "request_not_found")
            assert strange.text.replace(name, "nobody-s") == nobody.text
        assert served.ask("free", "DELETE", "/v1/requests/shared-name").json()["cancelled"] == 1
        rest = [line for line in lines if line]
    assert '"code": "cancelled"' in rest[-2]
    assert sum(row["cancelled"] for row in served.used("free")) == 1


def test_the_same_request_id_of_two_tenants_names_one_each(served: Served) -> None:
    held = threading.Event()

    def run(key: str, out: list[Any]) -> None:
        body = {"model": "causal", "prompt": "abc", "max_tokens": 300, "ignore_eos": True}
        held.set()
        out.append(served.ask(key, "POST", "/v1/completions", body, X_Request_ID="twice"))

    answers: dict[str, list[Any]] = {"free": [], "narrow": []}
    threads = [threading.Thread(target=run, args=item) for item in answers.items()]
    for thread in threads:
        thread.start()
    end = time.monotonic() + 20
    while len(served.live.serving.jobs) < 2 and time.monotonic() < end:
        time.sleep(0.005)
    assert served.ask("narrow", "DELETE", "/v1/requests/twice").json()["cancelled"] == 1
    for thread in threads:
        thread.join()
    assert error(answers["narrow"][0]) == (499, "cancelled")
    assert answers["free"][0].status_code == 200


def test_usage_is_that_of_the_answers(served: Served) -> None:
    """Whole answers, streams, several choices, an answer cut off by a client that goes."""
    before = {row["model"]: row for row in served.used("narrow")}["causal"]
    prompt = completion = 0
    for body in ({}, {"n": 3, "max_tokens": 7}, {"prompt": ["a", "bcd"], "n": 2}, {"stream": True, "max_tokens": 30}):
        if body.get("stream"):
            text = served.complete("narrow", **body, stream_options={"include_usage": True}).text
            usage = json.loads(text.strip().splitlines()[-3][6:])["usage"]
        else:
            usage = served.complete("narrow", **body).json()["usage"]
        prompt, completion = prompt + usage["prompt_tokens"], completion + usage["completion_tokens"]
    after = {row["model"]: row for row in served.used("narrow")}["causal"]
    assert after["prompt_tokens"] - before["prompt_tokens"] == prompt
    assert after["completion_tokens"] - before["completion_tokens"] == completion == 4 + 21 + 16 + 30
    assert after["ok"] - before["ok"] == 4


def test_metrics_by_tenant(served: Served) -> None:
    text = served.ask("metrics", "GET", "/metrics").text
    assert 'dfastllm_tenant_requests_total{status="ok",tenant="narrow"}' in text
    assert served.live.metric("tenant_requests_running", tenant="narrow") == 0
    rows = served.used("narrow")
    told = served.live.metric("tenant_generation_tokens_total", tenant="narrow", model_name="causal")
    assert told == sum(row["completion_tokens"] for row in rows if row["model"] == "causal")
    assert served.live.metric("ledger_up") == 1
    assert served.live.metric("ledger_owed_rows") == 0


def test_labels_of_tenants_are_bounded() -> None:
    from prometheus_client import CollectorRegistry

    registry = CollectorRegistry()
    metrics = TenantMetrics(registry, most=5)
    for n in range(1000):
        metrics.begun(f"t{n}")
        metrics.ended(f"t{n}", "m", "ok", 1, 2)
    seen = {
        s.labels["tenant"]: s.value for f in registry.collect() for s in f.samples if s.name.endswith("tokens_total")
    }
    assert seen == {f"t{n}": 2 for n in range(5)} | {OTHER: 2 * 995}


def test_a_disabled_key_ends_nothing_that_runs_and_begins_nothing(served: Served) -> None:
    key, text = served.store.create_key("free", actor="cli:me")
    assert served.complete(text).status_code == 200
    assert served.ask("admin", "DELETE", f"/admin/v1/keys/{key.id}").status_code == 200
    assert error(served.complete(text)) == (401, "invalid_api_key")


# ---- every layer, on scopes of other types


async def accepts(scope: Any, receive: Any, send: Any) -> None:
    scope.setdefault("seen", []).append(scope["type"])
    await send({"type": "websocket.accept"})


def through(layer: Any, **scope: Any) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    sent: list[dict[str, Any]] = []
    asked = {"path": "/ws", "headers": [], "extensions": {"websocket.http.response": {}}, "state": {}, **scope}

    async def receive() -> dict[str, Any]:
        return {"type": "websocket.connect"}

    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    asyncio.run(layer(asked, receive, send))
    return asked, sent


LAYERS: dict[str, Any] = {
    "Head": Head,
    "Trace": lambda app: Trace(app, lambda *_: None),
    "BodyLimit": lambda app: BodyLimit(app, 10),
    "Access": lambda app: Access(app, Keys("secret")),
}


def test_every_layer_of_the_application_is_looked_at_here() -> None:
    app = create_app(settings=Settings(api_key="k"))
    layers: list[Any] = [layer.cls for layer in app.user_middleware]
    assert {layer.__name__ for layer in layers} == LAYERS.keys()


@pytest.mark.parametrize("name", LAYERS)
def test_a_layer_on_a_websocket(name: str) -> None:
    """None of them swallows one, and none but Access says who it is."""
    asked, sent = through(LAYERS[name](accepts), type="websocket")
    assert [message["type"] for message in sent] == ["websocket.accept"]
    assert asked["state"].get("identity") is None
    asked, sent = through(LAYERS[name](accepts), type="websocket", headers=[(b"authorization", b"Bearer secret")])
    assert (asked["state"].get("identity") is OWNER) == (name == "Access")
    asked, sent = through(LAYERS[name](accepts), type="websocket", headers=[(b"authorization", b"Bearer wrong")])
    assert (sent[0]["type"] == "websocket.accept") == (name != "Access")
    assert ("seen" in asked) == (name != "Access")


def test_what_is_neither_http_nor_websocket_does_not_get_in() -> None:
    with pytest.raises(RuntimeError, match="webtransport"):
        through(Access(accepts, Keys("secret")), type="webtransport")


def test_an_identity_that_a_client_brings_is_none() -> None:
    """What stands in the state before is never taken for proved."""
    asked, _ = through(Access(accepts, Keys("secret")), type="websocket", state={"identity": OWNER, "credential": "x"})
    assert asked["state"] == {"identity": None, "credential": None}
    asked, _ = through(Access(accepts, Keys()), type="websocket")
    assert asked["state"]["identity"] is ANYONE


def test_only_a_job_submits_and_it_names_an_identity() -> None:
    """In the server's room nothing calls a worker's `submit` but `Serving.submit`, and that only `Job`."""
    found = set()
    room = Path(__file__).parents[2] / "src/dfastllm/server"
    for file in room.rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Attribute) and node.attr == "submit":
                found.add((file.name, ast.unparse(node.value)))
    readers = {item for item in found if "pool" in item[1]}
    assert found - readers == {("serving.py", "self.require_ready()"), ("jobs.py", "self.serving")}
