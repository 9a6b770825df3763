"""Pipelines on a real server: kept, run, streamed, ended, and refused with the step's name."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest
from websockets.sync.client import connect

from dfastllm.errors import ValidationError
from tests.kit.live import Live, serving
from tests.kit.served import random_engine, slow

EXAMPLE = Path(__file__).parents[3] / "examples" / "pipelines" / "redact.yaml"
LOOPS = (
    '(module (memory (export "memory") 1) (func (export "alloc") (param i32) (result i32) (i32.const 0))'
    ' (func (export "run") (param i32 i32) (result i64) (loop $l (br $l)) (i64.const 0)))'
)


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    engines = {
        "causal": random_engine("llama", seed=1),
        "canvas": random_engine("llada"),
        "slow": random_engine("llama"),
    }
    slow(engines["slow"], 0.02)
    with serving(engines) as running:
        yield running


def step(id: str, text: str, model: str = "causal", **more: Any) -> dict[str, Any]:
    return {"id": id, "model": model, "input": text, "options": {"max_tokens": 6, "temperature": 0}, **more}


def save(live: Live, *steps: dict[str, Any], name: str = "p", **more: Any) -> None:
    made = live.post("/v1/pipelines", {"name": name, "steps": list(steps), **more})
    assert made.status_code == 200, made.text


def run(live: Live, given: Any = "in", name: str = "p") -> httpx.Response:
    return live.post(f"/v1/pipelines/{name}/run", {"input": given})


def events(live: Live, given: Any = "in", name: str = "p") -> list[dict[str, Any]]:
    answer = live.post(f"/v1/pipelines/{name}/run", {"input": given, "stream": True})
    assert answer.headers["content-type"].startswith("text/event-stream")
    lines = [line.removeprefix("data: ") for line in answer.text.splitlines() if line]
    assert lines.pop() == "[DONE]"
    return [json.loads(line) for line in lines]


def plain(live: Live, prompt: str, model: str = "causal") -> str:
    """The same completion without a pipeline."""
    body = {"model": model, "prompt": prompt, "max_tokens": 6, "temperature": 0}
    return str(live.post("/v1/completions", body).json()["choices"][0]["text"])


def test_texts_pass_from_step_to_step(live: Live) -> None:
    save(
        live,
        step("b", "<{{ a }}>", "canvas", output="last"),
        step("a", "say {{ input.word }}"),
        output="{{ a }}|{{ last }}",
    )
    first = plain(live, "say hello")
    second = plain(live, f"<{first}>", "canvas")
    found = run(live, {"word": "hello"}).json()
    assert found["output"] == f"{first}|{second}"
    assert [one["id"] for one in found["steps"]] == ["a", "b"]
    assert [one["text"] for one in found["steps"]] == [first, second]
    assert found["usage"]["completion_tokens"] == sum(one["usage"]["completion_tokens"] for one in found["steps"])
    assert found["usage"]["prompt_tokens"] == sum(one["usage"]["prompt_tokens"] for one in found["steps"])


def test_a_stream_tells_each_step(live: Live) -> None:
    save(live, step("a", "{{ input }}"), step("b", "{{ a }}", when="a | length > 9999"), step("c", "{{ b }}c"))
    told = events(live)
    assert [(one["type"], one.get("step")) for one in told if one["type"] != "step_text"] == [
        ("step_started", "a"),
        ("step_done", "a"),
        ("step_skipped", "b"),
        ("step_started", "c"),
        ("step_done", "c"),
        ("done", None),
    ]
    final = told[-1]
    for name in "ac":
        text = "".join(one["text"] for one in told if one["type"] == "step_text" and one["step"] == name)
        assert text == next(one["text"] for one in final["steps"] if one["id"] == name)
    assert final["output"] == plain(live, "c")
    assert [one["status"] for one in final["steps"]] == ["done", "skipped", "done"]
    whole = run(live).json()
    assert [one["text"] for one in whole["steps"]] == [one["text"] for one in final["steps"]]


def test_steps_that_need_nothing_of_each_other_run_at_once(live: Live) -> None:
    save(
        live,
        *(
            step(f"s{i}", f"{i} {{{{ input }}}}", "slow", options={"max_tokens": 10, "ignore_eos": True})
            for i in range(4)
        ),
    )
    told = events(live)
    kinds = [one["type"] for one in told]
    assert kinds.index("step_done") > max(i for i, kind in enumerate(kinds) if kind == "step_started")


def test_a_module_and_a_model(live: Live) -> None:
    text = EXAMPLE.read_text().replace("demo-ar", "causal")
    made = httpx.post(f"{live.url}/v1/pipelines", content=text, headers={"content-type": "application/yaml"})
    assert made.json()["modules"] == ["digits"]
    found = run(live, "call 555 0199", "redact").json()
    assert found["steps"][0]["text"] == "call XXX XXXX"
    assert found["steps"][0].get("usage") is None
    assert run(live, "  ", "redact").json()["steps"][1]["status"] == "skipped"
    shown = live.get("/v1/pipelines/redact").json()
    assert shown["document"]["steps"][0]["module"] == "digits"


def test_list_show_delete(live: Live) -> None:
    save(live, step("a", "x"), name="gone")
    assert "gone" in [one["name"] for one in live.get("/v1/pipelines").json()["data"]]
    assert httpx.delete(f"{live.url}/v1/pipelines/gone").json() == {"name": "gone", "deleted": True}
    for answer in (
        httpx.delete(f"{live.url}/v1/pipelines/gone"),
        live.get("/v1/pipelines/gone"),
        run(live, name="gone"),
    ):
        assert answer.status_code == 404
        assert answer.json()["error"]["code"] == "pipeline_not_found"


@pytest.mark.parametrize(
    ("steps", "more", "status", "said", "param"),
    [
        ([step("a", "x"), step("b", "{{ a }}", "nomodel")], {}, 404, "Step b: There is no model 'nomodel'", "steps.b"),
        ([step("a", "{{ input.word }}")], {}, 400, "steps.a.input cannot be rendered", "steps.a.input"),
        ([step("a", "{{ input }}")], {"output": "{{ a.x.y }}"}, 400, "output cannot be rendered", "output"),
        (
            [{"id": "m", "module": "loops", "input": "x"}],
            {"modules": {"loops": {"wat": LOOPS}}},
            400,
            "Step m: loops ran for more than",
            "steps.m.modules",
        ),
        ([step("a", "")], {}, 400, "Step a: ", "steps.a"),
    ],
)
def test_an_error_names_its_step(
    live: Live, steps: list[dict[str, Any]], more: dict[str, Any], status: int, said: str, param: str
) -> None:
    save(live, *steps, **more)
    answer = run(live)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert said in error["message"]
    assert error["param"].startswith(param)
    told = events(live)
    assert told[-1]["error"]["message"] == error["message"]
    assert not any(one.get("type") == "done" for one in told)


def test_a_client_that_goes_frees_what_runs(live: Live) -> None:
    save(live, step("a", "{{ input }}", "slow", options={"max_tokens": 400, "ignore_eos": True}))
    engine = live.worker.engines["slow"]
    for stream in (False, True):
        with live.connect() as socket:
            body = json.dumps({"input": "x", "stream": stream}).encode()
            head = (
                "POST /v1/pipelines/p/run HTTP/1.1\r\nhost: localhost\r\n"
                f"content-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
            )
            socket.sendall(head.encode() + body)
            wait(lambda: len(engine.scheduler) > 0)
        wait(lambda: len(engine.scheduler) == 0)


def test_a_run_has_one_time_limit() -> None:
    with serving({"slow": slow(random_engine("llama"), 0.05)}, request_timeout=0.5) as live:
        options = {"max_tokens": 6, "ignore_eos": True}
        save(live, step("a", "x", "slow", options=options), step("b", "{{ a }}y", "slow", options=options))
        answer = run(live)
        assert answer.status_code == 504
        wait(lambda: len(live.worker.engines["slow"].scheduler) == 0)


def test_many_runs_at_once_equal_one_alone(live: Live) -> None:
    save(live, step("a", "{{ input }}"), step("b", "{{ a }}{{ input }}", "canvas"), name="many")
    alone = {str(i): run(live, str(i), "many").json()["output"] for i in range(8)}
    found: dict[int, tuple[str, str]] = {}

    def one(i: int) -> None:
        found[i] = str(i % 8), run(live, str(i % 8), "many").json()["output"]

    threads = [threading.Thread(target=one, args=(i,)) for i in range(24)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 24
    assert all(alone[given] == output for given, output in found.values())


def test_the_owner_s_pipelines_come_from_files(tmp_path: Path) -> None:
    file = tmp_path / "own.yaml"
    file.write_text("name: own\nsteps: [{id: a, input: '{{ input }}', options: {max_tokens: 2}}]\n")
    with serving({"m": random_engine("llama")}, pipelines=(str(file),)) as live:
        assert run(live, name="own").status_code == 200
        refused = live.post("/v1/pipelines", {"name": "own", "steps": [step("a", "x")]})
        assert "the server's owner" in refused.json()["error"]["message"]
        assert httpx.delete(f"{live.url}/v1/pipelines/own").status_code == 400
    file.write_text("name: own\nsteps: [{id: a, input: '{{ b }}'}]\n")
    with (
        pytest.raises(ValidationError, match=r"own.yaml: steps\.a\.input names 'b'"),
        serving({}, pipelines=(str(file),)),
    ):
        pass


def wait(done: Any, seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not done():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_over_a_websocket(live: Live) -> None:
    """The same events and the same result; an error names its step there too."""
    save(live, step("a", "{{ input }}"), step("b", "{{ a }}b", "canvas"), name="ws")
    wanted = events(live, name="ws")

    def call(params: dict[str, Any]) -> list[dict[str, Any]]:
        with connect(f"{live.url.replace('http', 'ws')}/ws") as socket:
            assert json.loads(socket.recv())["status"] == "connected"
            socket.send(json.dumps({"id": "1", "function": "pipeline", "params": params}))
            frames = []
            while not frames or frames[-1]["status"] == "streaming":
                frames.append(json.loads(socket.recv()))
            return frames

    frames = call({"name": "ws", "input": "in", "stream": True})
    told = [frame["data"] for frame in frames]
    assert [(one["type"], one.get("step"), one.get("text")) for one in told] == [
        (one["type"], one.get("step"), one.get("text")) for one in wanted
    ]
    assert frames[-1]["status"] == "complete"
    assert frames[-1]["data"]["output"] == wanted[-1]["output"]
    assert len(call({"name": "ws", "input": "in"})) == 1
    assert call({"name": "nothing", "input": "in"})[-1]["error"]["code"] == "INVALID_PARAMS"
    save(live, step("a", "{{ input.word }}"), name="ws")
    assert "steps.a.input" in call({"name": "ws", "input": "in"})[-1]["error"]["message"]
