"""openapi.json is true: schemathesis finds nothing, and what it cannot see is checked here.

The checks of schemathesis and the reason of each exclusion stand in schemathesis.toml beside this file. CI_LONG=1 is
the long form of scripts/ci-long: more examples, and its systematic phase too.
"""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from starlette.routing import WebSocketRoute

from dfastllm.options import SpeculativeParams
from tests.kit.live import Live, serving
from tests.kit.served import random_engine

LONG = bool(os.environ.get("CI_LONG"))
CONFIG = Path(__file__).with_name("schemathesis.toml")
KEY = {"Authorization": "Bearer secret"}
GENERATING = ("/v1/completions", "/v1/chat/completions")


@pytest.fixture(scope="module")
def keyed() -> Iterator[Live]:
    """One small model under the name of the examples, behind a key."""
    engines = {"demo-diffusion": random_engine("llada", max_len=320)}
    with serving(engines, api_key="secret", max_prompts=4, request_timeout=5.0) as running:
        yield running


@pytest.fixture(scope="module")
def api(keyed: Live) -> Any:
    return keyed.get("/openapi.json").json()


@pytest.mark.slow
@pytest.mark.timeout(3600 if LONG else 300)
def test_schemathesis_finds_nothing(keyed: Live) -> None:
    command = [str(Path(sys.executable).with_name("schemathesis")), "--config-file", str(CONFIG), "run"]
    command += [f"{keyed.url}/openapi.json", "--header", "Authorization: Bearer secret", "--workers", "1"]
    command += ["--max-examples", "200" if LONG else "8"]
    command += ["--phases", "examples,coverage,fuzzing" if LONG else "examples,fuzzing"]
    ran = subprocess.run(command, capture_output=True, text=True, cwd=CONFIG.parent)
    assert ran.returncode == 0, ran.stdout[-8000:] + ran.stderr[-2000:]
    answered = {(name, status, kind) for name, status, kind in keyed.seen if name.startswith("POST /v1")}
    for path in GENERATING:  # its examples are good requests, of which one streams
        for kind in ("application/json", "text/event-stream"):
            assert (f"POST {path}", 200, kind) in answered
    assert ("GET /v1/models", 200, "application/json") in keyed.seen


def test_every_route_is_described(keyed: Live, api: Any) -> None:
    routes = {
        (route.path_format, method.lower())  # type: ignore[attr-defined]
        for route in keyed.app.routes
        if not isinstance(route, WebSocketRoute)  # docs/websocket.md
        for method in route.methods  # type: ignore[attr-defined]
    }
    described = {(path, method) for path, methods in api["paths"].items() for method in methods}
    assert routes - described == {(path, "get") for path in ("/", "/docs", "/openapi.json", "/ws")}
    for methods in api["paths"].values():
        for operation in methods.values():
            assert "422" not in operation["responses"]
            for answer in operation["responses"].values():
                assert answer["content"]
                assert "X-Request-ID" in answer["headers"]


def test_statuses_types_and_keys(api: Any) -> None:
    for path in GENERATING:
        answers = api["paths"][path]["post"]["responses"]
        assert set(answers) == {"200", "400", "401", "404", "413", "429", "499", "500", "503", "504"}
        assert set(answers["200"]["content"]) == {"application/json", "text/event-stream"}
        assert "Retry-After" in answers["429"]["headers"]
    assert "text/plain" in api["paths"]["/metrics"]["get"]["responses"]["200"]["content"]
    assert api["components"]["securitySchemes"] == {"key": {"type": "http", "scheme": "bearer"}}
    open_paths = {path for path, methods in api["paths"].items() for op in methods.values() if "security" not in op}
    assert open_paths == {"/health", "/health/live", "/health/ready", "/version", "/metrics"}
    schemas = api["components"]["schemas"]
    for event in ("CommitEvent", "ReviseEvent", "ProvisionalEvent", "BlockDoneEvent", "StatsEvent"):
        assert event in schemas
    for name in ("ChatChunk", "CompletionChunk", "ErrorBody", "Figures", "UsageOut", "Health", "Tokens", "Cancelled"):
        assert schemas[name]["additionalProperties"] is False
    assert schemas["ChatRequest"]["examples"]
    drafts = schemas["SpeculativeOptions"]["properties"]
    assert drafts.keys() == SpeculativeParams.TABLE.keys()
    (length, _) = drafts["num_speculative_tokens"]["anyOf"]
    assert (length["type"], length["minimum"], length["maximum"]) == ("integer", 1, 64)
    (method, _) = drafts["method"]["anyOf"]
    assert method["enum"] == ["none", "ngram", "suffix", "draft_model", "diffusion", "self"]


def test_without_a_key_no_scheme_is_declared(live: Live) -> None:
    api = live.get("/openapi.json").json()
    assert "securitySchemes" not in api["components"]
    assert all("401" not in op["responses"] for methods in api["paths"].values() for op in methods.values())


def break_the_description() -> None:
    with serving({"causal": random_engine("llama", max_len=64)}) as running:
        api = copy.deepcopy(running.app.openapi())
        del api["components"]["schemas"]["UsageOut"]["properties"]["total_tokens"]
        del api["paths"]["/v1/completions"]["post"]["responses"]["400"]
        api["paths"]["/version"]["get"]["responses"]["200"]["headers"]["X-Other"] = {"required": True}
        running.app.openapi_schema = api
        running.post("/v1/completions", {"prompt": "x", "max_tokens": 1})
        running.post("/v1/completions", {"prompt": "x", "max_tokens": 0})
        running.get("/version")


def test_the_check_of_every_answer_can_fail() -> None:
    """`serving` holds each answer of the suite against openapi.json: it tells a field, a status and a header."""
    with pytest.raises(AssertionError) as failed:
        break_the_description()
    said = str(failed.value)
    assert "total_tokens" in said
    assert "POST /v1/completions 400: the status is not declared" in said
    assert "no header X-Other" in said


def test_head_on_every_get_route(keyed: Live, api: Any) -> None:
    paths = [path for path, methods in api["paths"].items() if "get" in methods]
    for path in [*paths, "/docs", "/openapi.json", "/"]:
        path = path.replace("{model_id}", "demo-diffusion")
        head = httpx.head(keyed.url + path, headers=KEY, timeout=30)
        get = httpx.get(keyed.url + path, headers=KEY, timeout=30)
        assert head.status_code == get.status_code, path
        assert head.content == b""
        assert head.headers["content-type" if path != "/" else "location"]
    assert httpx.head(f"{keyed.url}/v1/models", timeout=30).status_code == 401
    refused = httpx.head(f"{keyed.url}/v1/completions", headers=KEY, timeout=30)
    assert (refused.status_code, refused.headers["allow"], refused.content) == (405, "POST", b"")
    assert httpx.head(f"{keyed.url}/nothing", headers=KEY, timeout=30).status_code == 404


def test_the_root_leads_to_the_documentation(keyed: Live) -> None:
    page = httpx.get(keyed.url, timeout=30, follow_redirects=True)
    assert page.status_code == 200
    assert page.url.path == "/docs"
    assert "What is 12 + 30?" in page.text  # an example


SDK = "authorization,content-type,x-stainless-lang,x-stainless-retry-count,x-stainless-timeout"


def test_a_browsers_sdk_passes_its_preflight() -> None:
    origin = "https://app.example"
    with serving(
        {"causal": random_engine("llama", max_len=64)}, api_key="secret", allowed_origins=(origin,)
    ) as running:
        asks = {"Origin": origin, "Access-Control-Request-Method": "POST", "Access-Control-Request-Headers": SDK}
        url = f"{running.url}/v1/chat/completions"
        passed = httpx.options(url, headers=asks, timeout=30)
        assert passed.status_code == 200
        assert passed.headers["access-control-allow-origin"] == origin
        allowed = {name.strip().lower() for name in passed.headers["access-control-allow-headers"].split(",")}
        assert set(SDK.split(",")) <= allowed
        stranger = httpx.options(url, headers={**asks, "Origin": "https://evil.example"}, timeout=30)
        assert stranger.status_code == 400
        assert "access-control-allow-origin" not in stranger.headers
        answer = httpx.get(f"{running.url}/v1/models", headers={**KEY, "Origin": origin}, timeout=30)
        assert answer.headers["access-control-allow-origin"] == origin
        assert "X-Request-ID" in answer.headers["access-control-expose-headers"]


def test_the_model_may_be_left_out_where_one_is_served(keyed: Live) -> None:
    for path, body in (
        ("/v1/completions", {"prompt": "x", "max_tokens": 2}),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 2, "model": None}),
        ("/tokenize", {"prompt": "x"}),
        ("/detokenize", {"tokens": [5]}),
    ):
        answer = keyed.post(path, body, headers=KEY)
        assert answer.status_code == 200, answer.text
        assert answer.json().get("model", "demo-diffusion") == "demo-diffusion"


def test_the_page_of_the_server_names_every_route_and_option_of_a_stream(api: Any) -> None:
    page = (Path(__file__).parents[2] / "docs" / "server.md").read_text(encoding="utf-8")
    named = {f"{method.upper()} {path}" for path, methods in api["paths"].items() for method in methods}
    assert {route for route in named if f"`{route}`" not in page} == set()
    options = api["components"]["schemas"]["StreamOptions"]["properties"]
    assert {name for name in options if f"`{name}`" not in page} == set()
