"""The server as a process: `dfastllm serve` from the command line, its signals, its exit, and what it leaves behind."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2 as httpx
import pytest

from dfastllm.errors import ValidationError
from dfastllm.models import save
from dfastllm.server.listening import listen
from tests.kit.served import TEMPLATE, random_engine

MAIN = (sys.executable, "-c", "from dfastllm.cli import main; main()")
# The command as a user gives it, with steps slowed down so that a request is surely running when the signal comes.
SLOW_MAIN = """
import sys, time
from dfastllm.engine import Engine
step = Engine.step
def slow(self):
    time.sleep(0.02)
    if any(live.request.sampling.seed == 666 for live in self.scheduler.running):
        raise SystemExit("told to die")
    return step(self)
Engine.step = slow
from dfastllm.cli import main
sys.argv = ["dfastllm", *sys.argv[1:]]
main()
"""


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A random autoregressive model on disk."""
    directory = tmp_path_factory.mktemp("models") / "small"
    engine = random_engine("llama")
    directory.mkdir()
    assert engine.tokenizer is not None
    engine.tokenizer.backend.save(str(directory / "tokenizer.json"))
    special = {**engine.tokenizer.special_tokens, "chat_template": TEMPLATE}
    (directory / "tokenizer_config.json").write_text(json.dumps(special))
    return save(engine.model, directory)  # type: ignore[arg-type]


class Running:
    def __init__(self, process: subprocess.Popen[str], url: str) -> None:
        self.process = process
        self.url = url
        self.log = ""

    def post(self, **body: Any) -> httpx.Response:
        body = {"model": "small", "prompt": "x", "ignore_eos": True, **body}
        return httpx.post(f"{self.url}/v1/completions", json=body, timeout=60)

    def running(self) -> bool:
        return 'num_requests_running{model_name="small"} 1' in httpx.get(f"{self.url}/metrics").text

    def end(self, number: int, seconds: float = 60) -> int:
        """Send a signal; the exit code."""
        self.process.send_signal(number)
        _, self.log = self.process.communicate(timeout=seconds)
        return self.process.returncode


@contextmanager
def served(checkpoint: Path, *flags: str) -> Iterator[Running]:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-c", SLOW_MAIN, "serve", "--model", str(checkpoint), "--port", str(port), *flags]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment, start_new_session=True)
    server = Running(process, f"http://127.0.0.1:{port}")
    try:
        wait_until_ready(server)
        yield server
    finally:
        if process.poll() is None:
            process.kill()
            process.communicate()
        # Nothing of its session is left: no orphan.
        with pytest.raises(ProcessLookupError):
            os.killpg(process.pid, 0)


def wait_until_ready(server: Running) -> None:
    for _ in range(600):
        assert server.process.poll() is None, server.process.communicate()[1]
        try:
            if httpx.get(f"{server.url}/health/ready", timeout=5).status_code == 200:
                return
        except httpx.TransportError:
            pass
        time.sleep(0.05)
    raise AssertionError("the server did not become ready")


def background(server: Running, **body: Any) -> tuple[threading.Thread, list[Any]]:
    results: list[Any] = []

    def call() -> None:
        try:
            results.append(server.post(**body))
        except Exception as error:
            results.append(error)

    thread = threading.Thread(target=call)
    thread.start()
    while not server.running():
        time.sleep(0.02)
    return thread, results


def test_sigterm_lets_a_running_request_finish(checkpoint: Path) -> None:
    with served(checkpoint, "--shutdown-timeout", "20") as server:
        thread, results = background(server, max_tokens=60)
        assert server.end(signal.SIGTERM) == 0
        thread.join(10)
        assert results[0].status_code == 200
        assert results[0].json()["usage"]["completion_tokens"] > 50
        assert "SIGTERM: stopping" in server.log
        assert "Traceback" not in server.log


def test_sigint_ends_what_takes_too_long_with_an_error(checkpoint: Path) -> None:
    with served(checkpoint, "--shutdown-timeout", "0.3") as server:
        thread, results = background(server, max_tokens=500)
        began = time.monotonic()
        assert server.end(signal.SIGINT) == 0
        assert time.monotonic() - began < 8  # the request would take ten seconds
        thread.join(10)
        assert results[0].status_code == 503
        assert results[0].json()["error"]["code"] == "not_ready"
        assert "Traceback" not in server.log


def test_a_killed_server_breaks_the_connection_and_leaves_the_port_free(checkpoint: Path) -> None:
    with served(checkpoint) as server:
        thread, results = background(server, max_tokens=400)
        assert server.end(signal.SIGKILL) == -signal.SIGKILL
        thread.join(10)
        assert isinstance(results[0], httpx.TransportError)
        listen("127.0.0.1", int(server.url.rpartition(":")[2])).close()


def test_when_the_engines_thread_dies_clients_are_told_and_the_process_ends_with_an_error(checkpoint: Path) -> None:
    with served(checkpoint) as server:
        thread, results = background(server, max_tokens=400)
        assert server.post(max_tokens=4, seed=666).json()["error"]["code"] == "generation_failed"
        _, log = server.process.communicate(timeout=30)
        thread.join(10)
        assert results[0].status_code == 500
        assert server.process.returncode == 1
        assert "the engine's thread has died" in log
        assert log.splitlines()[-1] == "error: The engine's thread died of SystemExit: told to die."


def test_sigterm_while_loading(checkpoint: Path) -> None:
    slow_load = (
        "import time, dfastllm.assemble as m; load = m.load; m.load = lambda *a, **k: (time.sleep(60), load(*a, **k))"
    )
    command = [sys.executable, "-c", f"{slow_load}\n{MAIN[2]}", "serve", "--model", str(checkpoint), "--port", "0"]
    command += ["--shutdown-timeout", "0.2"]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
    assert process.stderr is not None
    lines = [process.stderr.readline() for _ in range(2)]  # in either order: the models load on a thread of their own
    assert sorted(what for what in ("listening on", "loading") if any(what in line for line in lines)) == [
        "listening on",
        "loading",
    ]
    process.send_signal(signal.SIGTERM)
    _, log = process.communicate(timeout=20)
    assert process.returncode == 0, log
    assert "ready" not in log


def test_a_port_in_use_is_told_at_once(checkpoint: Path) -> None:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ValidationError, match="in use") as refused:
            listen("127.0.0.1", port)
        assert refused.value.param == "port"
        command = [*MAIN, "serve", "--model", str(checkpoint), "--port", str(port)]
        ended = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert ended.returncode == 2
    assert f"Port {port} on 127.0.0.1 is in use." in ended.stderr
    assert "Traceback" not in ended.stderr


def test_addresses_that_cannot_be_listened_on() -> None:
    for host in ("no-such-host.invalid", "203.0.113.7", "a..b"):
        with pytest.raises(ValidationError) as refused:
            listen(host, 0)
        assert refused.value.param == "host"


def test_a_model_that_cannot_be_loaded_ends_the_server_with_its_error(tmp_path: Path) -> None:
    script = f"""
from dfastllm.server import serve
from dfastllm.settings import Settings
for model in ("no-such-model", {str(tmp_path)!r}):
    try:
        serve(Settings(model=(model,), port=0))
    except Exception as error:
        print(type(error).__name__, error)
"""
    ended = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    missing, unreadable = ended.stdout.splitlines()
    assert missing.startswith("ModelNotFoundError")
    assert "no-such-model" in missing
    assert unreadable.startswith(("ModelLoadError", "CheckpointError"))
    assert "config.json" in unreadable
    assert "Traceback" not in ended.stderr
