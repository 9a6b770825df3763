"""Servers that a run starts: ready, gone with the run in whatever way it ends, and never waited for in vain."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from dfastllm.bench.suite import launch
from dfastllm.bench.suite.launch import launched, started_process
from dfastllm.errors import GenerationError

# A server in a few lines: it answers 200 to anything, and says where it listens. With a child, which it leaves behind.
SERVER = """
import http.server, subprocess, sys
class All(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200); self.send_header("Content-Length", "0"); self.end_headers()
server = http.server.HTTPServer(("127.0.0.1", 0), All)
if "child" in sys.argv:
    print("child", subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"]).pid)
print(f"listening on http://127.0.0.1:{server.server_port}", flush=True)
server.serve_forever()
"""
# A run that starts that server and then waits for its own end.
RUN = """
import sys, time
from pathlib import Path
from dfastllm.bench.suite.launch import started_process
with started_process([sys.executable, "-c", sys.argv[1]], Path(sys.argv[2])) as started:
    print(started.pid, flush=True)
    time.sleep(60)
"""


def alive(pid: int) -> bool:
    """Whether a process is there that has not ended (one that has may wait for its parent to look)."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def gone(pid: int, seconds: float = 20.0) -> bool:
    until = time.monotonic() + seconds
    while alive(pid) and time.monotonic() < until:
        time.sleep(0.05)
    return not alive(pid)


def test_a_server_is_gone_after_its_block_with_what_it_started(tmp_path: Path) -> None:
    with started_process([sys.executable, "-c", SERVER, "child"], tmp_path / "log") as started:
        assert started.url.startswith("http://127.0.0.1:")
        child = int((tmp_path / "log").read_text().split()[1])
        assert alive(started.pid)
        assert alive(child)
    assert not alive(started.pid)
    assert gone(child)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="reads /proc")
@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_a_run_that_is_killed_leaves_no_server(tmp_path: Path, number: int) -> None:
    words = [sys.executable, "-c", RUN, SERVER, str(tmp_path / "log")]
    with subprocess.Popen(words, stdout=subprocess.PIPE, text=True) as run:
        assert run.stdout is not None
        server = int(run.stdout.readline())
        assert alive(server)
        run.send_signal(number)
    assert gone(server)


def test_the_end_of_the_block_ends_the_waiting(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run that is interrupted while its server loads does not wait for it on another thread."""
    failures: list[Exception] = []
    with launched([sys.executable, "-c", "import time; time.sleep(60)"], tmp_path / "log") as server:

        def wait() -> None:
            try:
                server.wait()
            except GenerationError as error:
                failures.append(error)

        thread = threading.Thread(target=wait)
        thread.start()
    thread.join(10)
    assert not thread.is_alive()
    assert "ended with code -15" in str(failures[0])


def test_a_server_that_ends_is_told_with_its_last_line(tmp_path: Path) -> None:
    words = [sys.executable, "-c", "print('first'); raise SystemExit('no such model')"]
    with pytest.raises(GenerationError, match="ended with code 1: no such model"), started_process(words):
        pass


def test_one_that_never_answers_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(launch, "LOADING", 0.3)
    words = [sys.executable, "-c", "import time; time.sleep(60)"]
    with pytest.raises(GenerationError, match=r"not ready after 0.3 s"), started_process(words, environment={"A": "b"}):
        pass
    assert "A" not in os.environ
