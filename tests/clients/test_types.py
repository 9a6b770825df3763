"""The clients' types are those of the server's own description."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from clients.generate_types import PYTHON, TYPESCRIPT, description, python, typescript

from tests.kit.source import ROOT


@pytest.fixture(scope="module")
def schemas() -> Any:
    return description()


@pytest.mark.parametrize(("path", "made"), [(TYPESCRIPT, typescript), (PYTHON, python)], ids=["node", "python"])
def test_they_are_current(path: Path, made: Callable[[Any], str], schemas: Any) -> None:
    current = path.read_text(encoding="utf-8") == made(schemas)
    assert current, f"{path.name} is not what openapi.json says: python -m clients.generate_types"


def test_a_schema_becomes_its_type() -> None:
    schema = {
        "properties": {
            "a": {"anyOf": [{"type": "integer"}, {"type": "null"}], "description": "First."},
            "b": {"type": "array", "items": {"anyOf": [{"$ref": "#/components/schemas/X"}, {"type": "string"}]}},
            "c": {"const": "x", "type": "string"},
            "d": {"type": "object", "additionalProperties": {"type": "number"}},
            "e": {"enum": ["p", "q"], "type": "string"},
        },
        "required": ["b"],
    }
    assert typescript({"T": schema}) == (
        "// Made by `python -m clients.generate_types` from the server's openapi.json; do not edit.\n\n"
        "export interface T {\n"
        "  /** First. */\n"
        "  a?: number | null;\n"
        "  b: (X | string)[];\n"
        '  c: "x";\n'
        "  d?: Record<string, number>;\n"
        '  e?: "p" | "q";\n'
        "}\n\n"
        "export type CanvasEvent = never;\n"
    )


def test_the_packages_agree_on_their_version() -> None:
    node = json.loads((ROOT / "clients/node/package.json").read_text(encoding="utf-8"))
    lock = json.loads((ROOT / "clients/node/package-lock.json").read_text(encoding="utf-8"))
    project = (ROOT / "clients/python/pyproject.toml").read_text(encoding="utf-8")
    found = re.search(r'^version = "(.+)"', project, re.MULTILINE)
    assert found is not None
    assert node["version"] == lock["version"] == found[1]
    assert "dependencies" not in node
    assert "http" not in json.dumps(lock), "the lock file names a host"


def test_the_python_client_imports_only_what_it_asks_for() -> None:
    allowed = {"httpx", "websockets", "dfastllm_client"}
    for path in (ROOT / "clients/python/src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) and not node.level else []
            assert {name.split(".")[0] for name in names} <= allowed | set(sys.stdlib_module_names), path
