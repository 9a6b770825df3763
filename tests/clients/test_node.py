"""The Node client's own tests (clients/node/test): golden transcripts, transports, the packed package, types."""

from __future__ import annotations

import re
import subprocess

from tests.kit.node import built_node_client


def test_the_node_client() -> None:
    folder = built_node_client()
    files = sorted(str(path) for path in (folder / "test").glob("*.test.mjs"))
    ran = subprocess.run(["node", "--test", *files], cwd=folder, capture_output=True, text=True, timeout=240)
    assert ran.returncode == 0, ran.stdout[-6000:] + ran.stderr[-2000:]
    passed = re.search(r"^(?:#|ℹ) pass (\d+)$", ran.stdout, re.MULTILINE)
    assert passed is not None
    assert int(passed[1]) >= 50
