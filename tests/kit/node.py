"""The Node client, installed and built once for all processes that test it."""

from __future__ import annotations

import fcntl
import hashlib
import shutil
import subprocess
from pathlib import Path

import pytest

from tests.kit.source import ROOT

__all__ = ["NODE", "built_node_client"]

NODE = ROOT / "clients" / "node"
_NO_REGISTRY = ("ENOTFOUND", "ECONNREFUSED", "ECONNRESET", "ETIMEDOUT", "EAI_AGAIN", "ENOTCACHED")


def _run(*command: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(command, cwd=NODE, capture_output=True, text=True)


def _state() -> str:
    files = [NODE / "package-lock.json", *NODE.glob("tsconfig*.json"), *sorted((NODE / "src").glob("*.ts"))]
    return hashlib.sha256(b"\0".join(path.read_bytes() for path in files)).hexdigest()


def built_node_client() -> Path:
    """The folder of the client with node_modules and dist as its sources are now. Skips where node or npm is missing,
    or no registry can be reached for the compiler."""
    if shutil.which("node") is None or shutil.which("npm") is None:
        pytest.skip("node and npm are needed")
    modules, stamp, made = NODE / "node_modules", NODE / "node_modules" / "state", NODE / "dist" / "cjs" / "index.js"
    with (NODE / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        installed = modules / "lock"
        wanted = (NODE / "package-lock.json").read_text(encoding="utf-8")
        if not installed.is_file() or installed.read_text(encoding="utf-8") != wanted:
            ran = _run("npm", "ci", "--no-audit", "--no-fund", "--fetch-retries", "0")
            if ran.returncode and any(word in ran.stderr for word in _NO_REGISTRY):
                pytest.skip("npm reaches no registry")
            assert ran.returncode == 0, ran.stderr
            installed.write_text(wanted, encoding="utf-8")
        if not made.is_file() or not stamp.is_file() or stamp.read_text(encoding="utf-8") != _state():
            ran = _run("npm", "run", "--silent", "build")
            assert ran.returncode == 0, ran.stdout + ran.stderr
            stamp.write_text(_state(), encoding="utf-8")
    return NODE
