"""examples/README.md as a newcomer follows it: the commands of its blocks, word for word but for where files lie.

Minutes, as both clients are installed from the registries: only with CI_LONG=1 (scripts/ci-long).
"""

from __future__ import annotations

import os
import re
import signal
import subprocess
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.kit.source import ROOT

pytestmark = pytest.mark.skipif(not os.environ.get("CI_LONG"), reason="only in the long form, scripts/ci-long")
PORT = os.environ.get("PORT", "8767")
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "examples" / "README.md").read_text(encoding="utf-8"), re.DOTALL)


def moved(block: str, folder: Path) -> str:
    return block.replace("/tmp/", f"{folder}/")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """Where the files of the blocks lie, while the server of the first one runs."""
    made = tmp_path_factory.mktemp("newcomer")
    surroundings = {**os.environ, "DFASTLLM_PORT": PORT}
    command = ["sh", "-eu", "-c", moved(BLOCKS[0], made).replace("./run serve", "exec ./run serve")]
    server = subprocess.Popen(command, cwd=ROOT, env=surroundings, start_new_session=True)
    try:
        until = time.monotonic() + 900
        while not ready():
            assert server.poll() is None, "the server ended"
            assert time.monotonic() < until, "the server was not ready in 15 minutes"
            time.sleep(0.5)
        yield made
    finally:
        os.killpg(server.pid, signal.SIGTERM)
        server.wait(30)


def ready() -> bool:
    try:
        return bool(urllib.request.urlopen(f"http://127.0.0.1:{PORT}/health/ready", timeout=5).status == 200)
    except OSError:
        return False


@pytest.mark.timeout(1200)
@pytest.mark.parametrize("block", BLOCKS[1:], ids=["python", "node"])
def test_the_commands_work(folder: Path, block: str) -> None:
    surroundings = {**os.environ, "DFASTLLM_URL": f"http://127.0.0.1:{PORT}"}
    failing = moved(block, folder).replace("|| break", "|| exit 1")
    ran = subprocess.run(["sh", "-eu", "-c", failing], cwd=ROOT, env=surroundings, capture_output=True, text=True)
    assert ran.returncode == 0, ran.stdout[-4000:] + ran.stderr[-4000:]
    assert "demo-diffusion: diffusion" in ran.stdout, "the last example did not run"
