"""A request's life: ids, cancelling, disconnecting, limits, readiness; and that what ends frees its compute."""

from __future__ import annotations

import asyncio
import contextlib
import dataclasses
import json
import socket
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any

import httpx2 as httpx
import pytest
from openai import APIError, AuthenticationError, InternalServerError, RateLimitError

from dfastllm.server.app import create_app
from dfastllm.server.listening import listen
from dfastllm.server.run import Server
from dfastllm.settings import Settings
from tests.kit.live import Live, serving
from tests.kit.served import parrot_engine, random_engine, slow

LONG: dict[str, Any] = {"model": "slow", "prompt": "x", "max_tokens": 400, "ignore_eos": True}


@pytest.fixture(scope="module")
def slow_live() -> Iterator[Live]:
    """A model that takes 10 ms a step: a long request runs for four seconds unless it is ended."""
    with serving({"slow": slow(random_engine("llama"), 0.01)}) as running:
        yield running


def until(condition: Callable[[], bool], seconds: float = 5.0) -> bool:
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.005)
    return True


def idle(live: Live) -> bool:
    """No request is known anywhere, and every K,V page is free."""
    engines = live.worker.engines.values()
    return not live.serving.jobs and all(not e.has_work and e.pages.used == 0 for e in engines)


def post_completions(body: dict[str, Any]) -> bytes:
    """The request as it goes over the wire."""
    data = json.dumps(body).encode()
    head = "POST /v1/completions HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(data)}\r\n\r\n".encode() + data


def in_background(call: Callable[[], Any]) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def run() -> None:
        try:
            results.append(call())
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=run)
    thread.start()
    return thread, results


def test_request_ids(slow_live: Live) -> None:
    given = slow_live.get("/version", headers={"X-Request-ID": "mine-42.a:b_C"})
    assert given.headers["x-request-id"] == "mine-42.a:b_C"
    for bad in ("", "a b", "x" * 129, "å", "a\tb"):
        answer = slow_live.get("/version", headers=[("X-Request-ID", bad.encode("latin-1"))])
        assert answer.headers["x-request-id"] not in ("", bad)
    assert slow_live.get("/nowhere").headers["x-request-id"]
    client = slow_live.client()
    raw = client.completions.with_raw_response.create(model="slow", prompt="x", max_tokens=1)
    assert raw.headers["x-request-id"]


def test_cancel_by_request_id(slow_live: Live) -> None:
    thread, results = in_background(
        lambda: slow_live.post("/v1/completions", LONG, headers={"X-Request-ID": "to-be-cancelled"})
    )
    assert until(lambda: bool(slow_live.serving.jobs))
    answer = httpx.delete(f"{slow_live.url}/v1/requests/to-be-cancelled")
    assert answer.json() == {"id": "to-be-cancelled", "object": "request", "cancelled": 1}
    thread.join(5)
    assert results[0].status_code == 499
    assert results[0].json()["error"]["code"] == "cancelled"
    assert until(lambda: idle(slow_live))
    assert httpx.delete(f"{slow_live.url}/v1/requests/to-be-cancelled").status_code == 404


def test_an_id_that_two_clients_send_ends_neither_request(slow_live: Live) -> None:
    """Nor does another's response id, sent as one's own X-Request-ID, keep that one from ending its request."""

    def stream(request_id: str) -> tuple[Any, str]:
        extra = {"ignore_eos": True}
        made = slow_live.client().completions.create(
            model="slow",
            prompt="x",
            max_tokens=400,
            stream=True,
            extra_body=extra,
            extra_headers={"X-Request-ID": request_id},
        )
        return made, next(made).id

    def cancel(name: str) -> int:
        return httpx.delete(f"{slow_live.url}/v1/requests/{name}").status_code

    first, id = stream("the-same")
    second, other = stream("the-same")
    third, _ = stream(id)
    assert cancel("the-same") == 404
    assert len(slow_live.serving.jobs) == 3
    assert cancel(id) == 200
    assert until(lambda: len(slow_live.serving.jobs) == 2)
    assert cancel("the-same") == 404  # it may still be the other's that is meant
    assert cancel(id) == 200  # by now an X-Request-ID that one request has
    assert cancel(other) == 200
    assert until(lambda: idle(slow_live))
    for made in (first, second, third):
        made.close()


def test_cancel_a_stream_by_response_id(slow_live: Live) -> None:
    stream = slow_live.client().completions.create(
        model="slow", prompt="x", max_tokens=400, n=2, stream=True, extra_body={"ignore_eos": True}
    )
    first = next(stream)
    assert httpx.delete(f"{slow_live.url}/v1/requests/{first.id}").status_code == 200
    with pytest.raises(APIError) as ended:
        list(stream)
    assert ended.value.code == "cancelled"
    assert until(lambda: idle(slow_live))


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_disconnects_frees_its_compute(slow_live: Live, stream: bool) -> None:
    steps = lambda: slow_live.metric("engine_steps_total", model_name="slow")  # noqa: E731
    before = steps()
    connection = slow_live.connect()
    connection.sendall(post_completions({**LONG, "stream": stream, "n": 2}))
    assert until(lambda: steps() > before + 3)
    if stream:
        assert connection.recv(100).startswith(b"HTTP/1.1 200")
    connection.close()
    assert until(lambda: idle(slow_live), 2.0)
    assert steps() < before + 200  # ended early: the whole would be 400 steps
    assert slow_live.metric("request_failure_total", reason="cancelled") >= 2


def test_a_stream_on_the_wire_ends_with_done(slow_live: Live) -> None:
    with httpx.stream(
        "POST", f"{slow_live.url}/v1/completions", json={**LONG, "max_tokens": 3, "stream": True}
    ) as answer:
        assert answer.headers["content-type"].startswith("text/event-stream")
        lines = [line for line in answer.iter_lines() if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    assert json.loads(lines[0].removeprefix("data: "))["object"] == "text_completion"


def test_an_error_in_mid_stream_is_an_event() -> None:
    engine = parrot_engine()
    with serving({"parrot": slow(engine, 0.02)}) as live:
        engine.model.teach(1, "a" * 300)  # type: ignore[attr-defined]
        request = {"model": "parrot", "prompt": "x", "max_tokens": 300, "stream": True}
        with httpx.stream("POST", f"{live.url}/v1/completions", json=request) as answer:
            lines = (line for line in answer.iter_lines() if line)
            assert "error" not in json.loads(next(lines).removeprefix("data: "))
            engine.model.fail = True  # type: ignore[attr-defined]
            *_, error, done = lines
        assert json.loads(error.removeprefix("data: "))["error"]["code"] == "generation_failed"
        assert done == "data: [DONE]"
        assert until(lambda: idle(live))


def test_timeout_is_504_and_frees() -> None:
    with serving({"slow": slow(random_engine("llama"), 0.01)}, request_timeout=0.2) as live:
        began = time.monotonic()
        with pytest.raises(InternalServerError) as late:
            live.client().completions.create(model="slow", prompt="x", max_tokens=400, extra_body={"ignore_eos": True})
        assert late.value.status_code == 504
        assert late.value.code == "timeout"
        assert time.monotonic() - began < 2.0
        with pytest.raises(InternalServerError):  # a request may ask for less, not for more
            live.client().completions.create(
                model="slow", prompt="x", max_tokens=400, extra_body={"ignore_eos": True, "timeout": 60}
            )
        answer = live.post("/v1/completions", {**LONG, "timeout": 0.05})
        assert answer.status_code == 504
        assert until(lambda: idle(live))
        assert live.metric("request_failure_total", reason="timeout") == 3


def test_a_full_queue_is_429_with_retry_after() -> None:
    engine = slow(random_engine("llama", max_sequences=1, max_waiting=2), 0.01)
    with serving({"slow": engine}) as live:
        running = [in_background(lambda: live.post("/v1/completions", LONG)) for _ in range(1)]
        assert until(lambda: len(engine.scheduler.running) == 1)
        running += [in_background(lambda: live.post("/v1/completions", LONG)) for _ in range(2)]
        assert until(lambda: len(engine.scheduler.waiting) == 2)
        with pytest.raises(RateLimitError) as full:
            live.client().completions.create(model="slow", prompt="x")
        assert full.value.code == "queue_full"
        assert full.value.type == "rate_limit_error"
        assert int(full.value.response.headers["retry-after"]) >= 1
        connection = live.connect()  # one that waits goes away: it leaves the queue though nothing is being sent
        engine.scheduler.config = engine.config = dataclasses.replace(engine.config, max_waiting=3)
        connection.sendall(post_completions(LONG))
        assert until(lambda: len(engine.scheduler.waiting) == 3)
        connection.close()
        assert until(lambda: len(engine.scheduler.waiting) == 2, 1.0)
        for job in list(live.serving.jobs.values()):
            job.cancel()
        for thread, results in running:
            thread.join(5)
            assert results[0].status_code == 499
        # A call that does not fit whole takes nothing: no half of it keeps the queue full.
        assert live.post("/v1/completions", {**LONG, "n": 9}).status_code == 429
        assert until(lambda: idle(live))
        assert live.post("/v1/completions", {**LONG, "max_tokens": 2}).status_code == 200


def test_body_limit_with_and_without_a_declared_length() -> None:
    with serving({"m": random_engine("llama")}, max_body_bytes=2000) as live:
        big = json.dumps({"model": "m", "prompt": "x" * 3000}).encode()
        headers = {"content-type": "application/json"}
        declared = httpx.post(f"{live.url}/v1/completions", content=big, headers=headers)
        assert declared.status_code == 413
        assert declared.json()["error"]["code"] == "payload_too_large"
        chunked = httpx.post(f"{live.url}/v1/completions", content=iter([big[:1500], big[1500:]]), headers=headers)
        assert "content-length" not in chunked.request.headers
        assert chunked.status_code == 413
        assert chunked.headers["x-request-id"]
        small = json.dumps({"model": "m", "prompt": "x", "max_tokens": 1}).encode()
        assert httpx.post(f"{live.url}/v1/completions", content=iter([small]), headers=headers).status_code == 200


def test_api_key() -> None:
    with serving({"m": random_engine("llama")}, api_key="s3cret") as live:
        for key in ("wrong", "s3cre", "s3crets", "é"):
            answer = live.get("/v1/models", headers=[("Authorization", f"Bearer {key}".encode("latin-1"))])
            assert answer.status_code == 401
            assert answer.headers["www-authenticate"] == "Bearer"
        assert live.get("/v1/models", headers={"Authorization": "Basic s3cret"}).status_code == 401
        with pytest.raises(AuthenticationError) as refused:
            live.client().completions.create(model="m", prompt="x")
        assert refused.value.code == "invalid_api_key"
        for path in ("/tokenize", "/v1/chat/completions", "/healthy", "/nowhere"):
            assert live.post(path, {}).status_code == 401
        for path in ("/health", "/health/live", "/health/ready", "/metrics", "/version", "/docs", "/openapi.json"):
            assert live.get(path).status_code == 200
        assert live.client(api_key="s3cret").models.list().data[0].id == "m"


def test_browsers_only_from_allowed_origins() -> None:
    with serving({"m": random_engine("llama")}, allowed_origins=("https://page.example",), api_key="k") as live:
        asks = {"Origin": "https://page.example", "Access-Control-Request-Method": "POST"}
        asks["Access-Control-Request-Headers"] = "authorization,content-type"
        allowed = httpx.options(f"{live.url}/v1/completions", headers=asks)
        assert allowed.status_code == 200
        assert allowed.headers["access-control-allow-origin"] == "https://page.example"
        other = httpx.options(f"{live.url}/v1/completions", headers={**asks, "Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in other.headers
    with serving({"m": random_engine("llama")}) as live:
        assert (
            "access-control-allow-origin" not in live.get("/version", headers={"Origin": "https://x.example"}).headers
        )


def test_answers_while_loading_then_ready_then_stopping() -> None:
    settings = Settings(port=0, shutdown_timeout=0.2)
    app = create_app(settings=settings)
    server = Server(app, settings)
    with listen("127.0.0.1", 0) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        try:
            assert server.up.wait(20)
            assert httpx.get(f"{url}/health/live").json() == {"status": "loading"}
            for path in ("/health", "/health/ready"):
                answer = httpx.get(url + path)
                assert (answer.status_code, answer.json()) == (503, {"status": "loading"})
            refused = httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x"})
            assert refused.status_code == 503
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error"]["code"] == "not_ready"
            assert httpx.get(f"{url}/v1/models").status_code == 503

            from dfastllm.engine import Worker

            engines = {"m": random_engine("llama")}
            with Worker(engines) as worker:
                app.state.serving.open(worker, engines)
                assert httpx.get(f"{url}/health").json() == {"status": "ready", "models": ["m"]}
                assert (
                    httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x"}, timeout=60).status_code
                    == 200
                )
                app.state.serving.drain()
                assert httpx.get(f"{url}/health/ready").json() == {"status": "stopping"}
                assert httpx.get(f"{url}/health/live").status_code == 200
                late = httpx.post(f"{url}/v1/completions", json={"model": "m", "prompt": "x"})
                assert "shutting down" in late.json()["error"]["message"]
                app.state.serving.draining = False
            assert httpx.get(f"{url}/health/live").status_code == 503  # the engine's thread is gone
            assert httpx.get(f"{url}/health").json() == {"status": "failed"}
        finally:
            server.should_exit = True
            thread.join(20)


def test_the_event_loop_is_free_while_a_step_runs() -> None:
    with serving({"slow": slow(random_engine("llama"), 0.5)}) as live:
        thread, _ = in_background(lambda: live.post("/v1/completions", {**LONG, "max_tokens": 4}))
        assert until(lambda: bool(live.serving.jobs))
        times = []
        for _ in range(10):
            began = time.monotonic()
            assert live.get("/health").status_code == 200
            times.append(time.monotonic() - began)
        assert sorted(times)[5] < 0.25  # a step takes half a second
        thread.join(20)


def test_documents_and_metrics(slow_live: Live) -> None:
    api = slow_live.get("/openapi.json").json()
    assert {"/v1/completions", "/v1/chat/completions", "/v1/models", "/metrics"} <= set(api["paths"])
    fields = api["components"]["schemas"]["CompletionRequest"]
    assert fields["additionalProperties"] == {"type": "null"}  # null is absence; nothing else passes
    page = slow_live.get("/docs")
    assert page.headers["content-type"].startswith("text/html")
    for name in (*api["paths"], *fields["properties"]):
        assert name in page.text, name
    assert "<script" not in page.text
    assert "https://" not in page.text
    versions = slow_live.get("/version").json()
    assert set(versions) == {"version", "torch", "python"}
    slow_live.post("/v1/completions", {**LONG, "max_tokens": 2})
    metrics = slow_live.get("/metrics")
    assert metrics.headers["content-type"].startswith("text/plain")
    assert 'dfastllm_num_requests_running{model_name="slow"} 0.0' in metrics.text
    assert 'dfastllm_http_requests_total{handler="/v1/completions",method="POST",status="200"}' in metrics.text


@pytest.mark.parametrize("host", ["127.0.0.1", "::1"])
def test_a_streams_small_writes_leave_at_once(host: str) -> None:
    """TCP_NODELAY on what is accepted; else a client's delayed acknowledgement holds the tokens back for 40 ms."""

    async def accepted() -> int:
        found: asyncio.Future[int] = asyncio.get_running_loop().create_future()

        def met(_: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            ours: socket.socket = writer.get_extra_info("socket")
            found.set_result(ours.getsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY))
            writer.close()

        with contextlib.closing(listen(host, 0)) as listener:
            async with await asyncio.start_server(met, sock=listener):
                _, writer = await asyncio.open_connection(*listener.getsockname()[:2])
                value = await found
                writer.close()
        return value

    assert asyncio.run(accepted()) == 1
