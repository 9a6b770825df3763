"""`dfastllm top` and the endpoint behind it, on a real server."""

from __future__ import annotations

import io
import json
import threading
import time
from collections.abc import Iterator

import httpx2 as httpx
import pytest
from rich.console import Console
from typer.testing import CliRunner

from dfastllm.cli import app
from dfastllm.cli.top import shown
from tests.kit.live import Live, serving
from tests.kit.served import random_engine, slow


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    with serving({"causal": slow(random_engine("llama"), 0.02), "canvas": random_engine("llada")}) as running:
        yield running


def top(*args: str) -> tuple[int, str]:
    done = CliRunner().invoke(app, ["top", *args], env={"COLUMNS": "80", "DFASTLLM_API_KEY": ""})
    return done.exit_code, done.output


def test_what_runs_is_seen(live: Live) -> None:
    body = {"model": "causal", "prompt": "hello", "max_tokens": 200, "ignore_eos": True}
    thread = threading.Thread(target=live.post, args=("/v1/completions", body))
    thread.start()
    deadline = time.monotonic() + 20
    while True:
        code, text = top(live.url, "--json")
        assert code == 0, text
        found = json.loads(text)
        if found["requests"] and found["requests"][0]["tokens"] > 2:
            break
        assert time.monotonic() < deadline
        time.sleep(0.05)
    request = found["requests"][0]
    assert (request["model"], request["tenant"], request["prompt_tokens"]) == ("causal", "default", 5)
    assert found["requests_total"] == 1
    assert found["tenants"] == [{"name": "default", "requests": 1, "tokens": request["tokens"]}]
    model = next(one for one in found["models"] if one["name"] == "causal")
    assert model["running"] == 1
    assert model["tokens_per_second"] > 0
    assert 0 < model["pages"] < model["pages_total"]
    code, text = top(live.url, "--once")
    assert code == 0
    assert max(map(len, text.splitlines())) <= 80
    assert request["id"][:19] in text
    httpx.delete(f"{live.url}/v1/requests/{request['id']}")
    thread.join()
    assert json.loads(top(live.url, "--json")[1])["requests"] == []


def test_a_full_table_fits_80_columns() -> None:
    long = "a-very-long-name-of-something-that-people-chose"
    view = {
        "version": "0.1.0", "phase": "ready", "uptime_seconds": 123456.0, "requests_total": 900,
        "models": [{"name": long, "running": 1024, "waiting": 1024, "tokens_per_second": 123456.7,
                    "tokens_per_forward": 12.345, "pages": 9, "pages_total": 9, "prefix_hits": 1.0, "accepted": 0.5}],
        "adapters": [{"name": long, "model": long, "rank": 256, "bytes": 1 << 31, "in_memory": False, "running": 0}],
        "tenants": [{"name": long, "requests": 900, "tokens": 123456789}],
        "requests": [{"id": "chatcmpl-" + "0" * 32, "model": long, "tenant": long, "adapter": long, "seconds": 4000.0,
                      "prompt_tokens": 123456, "tokens": 123456}] * 20,
    }  # fmt: skip
    console = Console(width=80, record=True, file=io.StringIO())
    console.print(shown(view, "http://127.0.0.1:8000"))
    text = console.export_text()
    assert max(map(len, text.splitlines())) <= 80
    assert "on disk" in text
    assert "2.0 GiB" in text
    assert "and 890 more" in text
    assert "1 h 06 min" in text


def test_who_may_look() -> None:
    with serving({"m": random_engine("llama")}, api_key="secret") as live:
        assert live.get("/admin/v1/view").status_code == 401
        code, text = top(live.url, "--json", "--api-key", "wrong")
        assert code == 1
        assert "The API key is wrong" in text
        assert top(live.url, "--json", "--api-key", "secret")[0] == 0


def test_nobody_there() -> None:
    code, text = top("http://127.0.0.1:9", "--json")
    assert code == 1
    assert "does not answer" in text
    assert "dfastllm serve" in text
