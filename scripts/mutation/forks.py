"""Runs chosen tests in a fresh process, over and over, without importing torch each time.

usage: python -m scripts.mutation.forks ROOT LOG     (started by trial, one for each copy of the tree)

Reads a line of JSON with the tests to run, forks a process that imports the package as it is now and runs them until
the first fails, and answers with a line of JSON: which failed and how, or that none did. What is imported before the
fork holds nothing of the package.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import resource
import select
import signal
import sys
import time
from typing import Any

import pytest

__all__ = ["Progress", "serve"]

AHEAD = (
    "torch numpy hypothesis transformers transformers.modeling_utils tokenizers safetensors.torch gguf jinja2 pydantic "
    "fastapi fastapi.testclient uvicorn openai prometheus_client httpx2 jsonschema typer rich.console "
    "schemathesis.pytest.plugin anyio.pytest_plugin pytest_timeout"
).split()
MEMORY = 16 << 30  # of addresses; a fault may ask for any amount


class Progress:
    """Inside of the process that runs the tests: chooses and orders them, and says what happens, a line each."""

    def __init__(self, tests: list[str], out: int) -> None:
        self.order = {test: at for at, test in enumerate(tests)}
        self.out = out

    def say(self, *words: str) -> None:
        os.write(self.out, (json.dumps(words) + "\n").encode())

    def pytest_collection_modifyitems(self, items: list[pytest.Item]) -> None:
        items[:] = sorted((one for one in items if one.nodeid in self.order), key=lambda one: self.order[one.nodeid])
        self.say("chosen", str(len(items)))

    def pytest_collectreport(self, report: pytest.CollectReport) -> None:
        if report.failed:
            self.say("failed", report.nodeid, "collection", last_line(report.longrepr))

    def pytest_runtest_logstart(self, nodeid: str) -> None:
        self.say("begin", nodeid)

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.failed:
            self.say("failed", report.nodeid, report.when, last_line(report.longrepr))


def last_line(text: Any) -> str:
    """The error of a failure: its last line that begins with E, cut short."""
    lines = [line[2:].strip() for line in str(text).splitlines() if line.startswith("E ")]
    return (lines or str(text).strip().splitlines()[-1:] or [""])[0][:160]


def child(tests: list[str], out: int, log: str, limited: bool) -> None:
    """Never returns: runs `tests` in this process and leaves with pytest's status. limited: in MEMORY of addresses,
    which programs under ThreadSanitizer do not live with."""
    os.setsid()
    if limited:
        resource.setrlimit(resource.RLIMIT_AS, (MEMORY, MEMORY))
    file = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(file, 1)
    os.dup2(file, 2)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    status = 3
    try:
        os.write(out, b'["started"]\n')
        files = list(dict.fromkeys(test.split("::")[0] for test in tests))
        flags = ["-x", "-q", "-p", "no:cacheprovider", "-p", "no:xdist", "--timeout=0"]
        status = int(pytest.main([*flags, *files], plugins=[Progress(tests, out)]))
    finally:
        sys.stdout.flush()
        os._exit(status)


def attempt(tests: list[str], seconds: dict[str, float], log: str, limited: bool) -> dict[str, Any]:
    """Run `tests` in a fork. A test hangs that takes 20 times as long as on the unchanged source, and over a minute."""
    begin, end = os.pipe()
    pid = os.fork()
    if pid == 0:
        os.close(begin)
        child(tests, end, log, limited)
    os.close(end)
    found: dict[str, Any] = {"noticed": False, "test": "", "error": "", "hung": False, "began": False}
    limit, current, left, ran = time.monotonic() + 180, "collection", b"", 0
    chosen = None
    while True:
        ready, _, _ = select.select([begin], [], [], max(0.0, limit - time.monotonic()))
        if not ready:
            found |= {"noticed": True, "hung": True, "test": current, "error": "time-out"}
            break
        more = os.read(begin, 65536)
        if not more:
            break
        *lines, left = (left + more).split(b"\n")
        for line in lines:
            word, *rest = json.loads(line)
            if word == "started":
                found["began"] = True
            elif word == "begin":
                current, ran = rest[0], ran + 1
                limit = time.monotonic() + max(60.0, 20 * seconds.get(current, 0.0))
            elif word == "chosen":
                chosen = int(rest[0])
            elif not found["noticed"]:
                found |= {"noticed": True, "test": rest[0], "error": f"{rest[1]}: {rest[2]}"}
                limit = time.monotonic() + 20
    if found["hung"]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    with contextlib.suppress(ProcessLookupError, PermissionError):
        os.killpg(pid, signal.SIGKILL)  # servers that tests left behind
    os.close(begin)
    if not found["noticed"] and status != 0:
        word = "nothing chosen" if chosen == 0 else f"process ended with status {status}"
        found |= {"noticed": chosen != 0, "test": current, "error": word}
    return {**found, "ran": ran}


def serve(root: str, log: str) -> None:
    """Answer lines of standard input until it ends."""
    os.chdir(root)
    sys.path[0] = root  # of `-m`: where this file came from
    for name in AHEAD:
        with contextlib.suppress(ImportError):
            importlib.import_module(name)
    assert not any(name.split(".")[0] == "dfastllm" for name in sys.modules)
    out = os.dup(1)
    os.dup2(2, 1)
    for line in sys.stdin:
        asked = json.loads(line)
        os.write(out, (json.dumps(attempt(asked["tests"], asked["seconds"], log, asked["limited"])) + "\n").encode())


if __name__ == "__main__":
    serve(sys.argv[1], sys.argv[2])
