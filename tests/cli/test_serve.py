"""`dfastllm serve` as a process: a port of its own, an answer, and a clean end."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable
from pathlib import Path

from typer.testing import Result

Cli = Callable[..., Result]


def wait_for(pattern: str, log: Path, process: subprocess.Popen[bytes]) -> str:
    """The group of `pattern` once the log holds it."""
    limit = time.monotonic() + 90
    while not (found := re.search(pattern, log.read_text())):
        assert process.poll() is None, log.read_text()
        assert time.monotonic() < limit, log.read_text()
        time.sleep(0.1)
    return found.group(1)


def test_serve_answers_and_ends_on_sigterm(diffusion: Path, ar: Path, tmp_path: Path) -> None:
    command = [str(Path(sys.executable).with_name("dfastllm")), "serve", str(diffusion), str(ar)]
    environment = {**os.environ, "DFASTLLM_PORT": "0", "DFASTLLM_PROT": "1", "DFASTLLM_API_KEY": "s3cret"}
    log = tmp_path / "log"
    with log.open("w") as file:
        process = subprocess.Popen(command, env=environment, stderr=file)
    try:
        port = wait_for(r"listening on http://127\.0\.0\.1:(\d+)", log, process)
        wait_for(r"ready: (canvas, causal)", log, process)
        body = {"model": "causal", "prompt": "hello", "max_tokens": 4}
        request = urllib.request.Request(
            f"http://127.0.0.1:{port}/v1/completions",
            data=json.dumps(body).encode(),
            headers={"content-type": "application/json", "authorization": "Bearer s3cret"},
        )
        with urllib.request.urlopen(request, timeout=60) as response:
            assert json.load(response)["model"] == "causal"
        process.send_signal(signal.SIGTERM)
        assert process.wait(30) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()
    text = log.read_text()
    assert "warning: DFASTLLM_PROT is set but is no setting" in text
    assert "s3cret" not in text


def test_serve_refuses(cli: Cli, diffusion: Path) -> None:
    for arguments, says in (
        (["--port", "http"], "port must be a whole number from 0 to 65535; got 'http' (from --port)."),
        (["--log-level", "loud"], "log_level must be one of debug, info, warning, error; got 'loud'"),
        ([str(diffusion), "--model", str(diffusion)], "give them once"),
        (["--model", "a", "--served-model-name", "x", "--served-model-name", "y"], "must name each model once"),
    ):
        result = cli("serve", *arguments)
        assert result.exit_code == 2
        [line] = result.stderr.splitlines()
        assert says in line
