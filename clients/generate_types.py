"""Writes the clients' types from the server's own description, so that both say what the server says.

    python -m clients.generate_types

- clients/node/src/wire.ts: every schema of openapi.json, as TypeScript.
- clients/python/src/dfastllm_client/wire.py: the canvas events, as TypedDicts.

tests/clients/test_types.py fails when either is not what this writes.
"""

from __future__ import annotations

import re
import tempfile
import textwrap
from collections.abc import Mapping
from pathlib import Path
from typing import Any

__all__ = ["PYTHON", "TYPESCRIPT", "description", "python", "typescript"]

Schema = Mapping[str, Any]

HERE = Path(__file__).parent
TYPESCRIPT = HERE / "node" / "src" / "wire.ts"
PYTHON = HERE / "python" / "src" / "dfastllm_client" / "wire.py"
_HEAD = "Made by `python -m clients.generate_types` from the server's openapi.json; do not edit."
_UNION = "CanvasEvent"
_SCALARS = {"string": ("string", "str"), "integer": ("number", "int"), "number": ("number", "float")}
_SCALARS |= {"boolean": ("boolean", "bool"), "null": ("null", "None")}


def description() -> Schema:
    """The schemas of openapi.json by name, of a server with every route it may have."""
    from dfastllm.server.app import create_app
    from dfastllm.settings import Settings
    from dfastllm.tenants.store import Store

    with tempfile.TemporaryDirectory() as folder:
        file = f"{folder}/tenants.db"
        store = Store(file, create=True)
        store.create_tenant("types", actor="cli:types")
        store.close()
        app = create_app(settings=Settings(tenants_db=file))
        schemas: Schema = app.openapi()["components"]["schemas"]
        app.state.serving.close()
    return schemas


def _name(schema: Schema) -> str:
    return str(schema["$ref"]).rpartition("/")[2]


def _canvas(schema: Schema) -> list[str] | None:
    """The names of the canvas events where a schema is their tagged union, else None."""
    mapping = schema.get("discriminator", {}).get("mapping", {})
    return [str(ref).rpartition("/")[2] for ref in mapping.values()] if "commit" in mapping else None


def _canvas_in(schema: Any) -> list[str] | None:
    """The same, of the first such union anywhere in a schema."""
    parts = schema if isinstance(schema, list) else list(schema.values()) if isinstance(schema, dict) else []
    own = _canvas(schema) if isinstance(schema, dict) else None
    return own or next((found for part in parts if (found := _canvas_in(part))), None)


def _ts(schema: Schema) -> str:
    """A schema as a type expression of TypeScript."""
    if "$ref" in schema:
        return _name(schema)
    if _canvas(schema):
        return _UNION
    if parts := schema.get("anyOf") or schema.get("oneOf"):
        return " | ".join(dict.fromkeys(_ts(part) for part in parts))
    if "const" in schema:
        return _literal(schema["const"])
    if "enum" in schema:
        return " | ".join(_literal(value) for value in schema["enum"])
    kind = schema.get("type")
    if kind == "array":
        item = _ts(schema.get("items", {}))
        return f"({item})[]" if " " in item and not item.startswith("{") else f"{item}[]"
    if kind == "object" or "properties" in schema:
        if "properties" in schema:
            fields = (f"{name}{_mark(schema, name)}: {_ts(field)}" for name, field in schema["properties"].items())
            return "{ " + "; ".join(fields) + " }"
        more = schema.get("additionalProperties", True)
        return f"Record<string, {'unknown' if isinstance(more, bool) else _ts(more)}>"
    return _SCALARS[kind][0] if kind in _SCALARS else "unknown"


def _literal(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    return f'"{value}"' if isinstance(value, str) else str(value)


def _mark(schema: Schema, name: str) -> str:
    return "" if name in schema.get("required", ()) or "const" in schema["properties"][name] else "?"


def _comment(text: str | None, indent: str) -> str:
    if not text:
        return ""
    words = re.sub(r"\s+", " ", text).replace("*/", "* /").strip()
    if len(words) + len(indent) <= 110:
        return f"{indent}/** {words} */\n"
    lines = "".join(f"{indent} * {line}\n" for line in textwrap.wrap(words, 110 - len(indent)))
    return f"{indent}/**\n{lines}{indent} */\n"


def typescript(schemas: Schema) -> str:
    """The whole of wire.ts."""
    out = [f"// {_HEAD}\n"]
    for name in sorted(schemas):
        schema = schemas[name]
        head = _comment(schema.get("description"), "")
        if "properties" not in schema:
            out.append(f"{head}export type {name} = {_ts(schema)};\n")
            continue
        fields = "".join(
            f"{_comment(field.get('description'), '  ')}  {key}{_mark(schema, key)}: {_ts(field)};\n"
            for key, field in schema["properties"].items()
        )
        out.append(f"{head}export interface {name} {{\n{fields}}}\n")
    out.append(f"export type {_UNION} = {' | '.join(_canvas_in(schemas) or ['never'])};\n")
    return "\n".join(out)


def _py(schema: Schema) -> str:
    """A schema as an annotation of Python."""
    if "$ref" in schema:
        return _name(schema)
    if parts := schema.get("anyOf"):
        return " | ".join(_py(part) for part in parts)
    if "const" in schema:
        return f"Literal[{_literal(schema['const'])}]"
    if schema.get("type") == "array":
        return f"list[{_py(schema['items'])}]"
    return _SCALARS[schema["type"]][1]


def python(schemas: Schema) -> str:
    """The whole of wire.py: the canvas events and what they hold."""
    members = _canvas_in(schemas) or []
    held = {ref for name in members for ref in re.findall(r"#/components/schemas/(\w+)", str(schemas[name]))}
    names = [*sorted(held), *sorted(members)]
    exported = ", ".join(f'"{name}"' for name in sorted([*names, _UNION]))
    out = [
        f'"""The typed events of a canvas.\n\n{_HEAD}\n"""',
        "from __future__ import annotations",
        "from typing import Literal, TypedDict",
        f"__all__ = [\n    {exported.replace(', ', f',{chr(10)}    ')},\n]",
    ]
    classes = []
    for name in names:
        schema = schemas[name]
        assert set(schema["required"]) == set(schema["properties"]), f"{name} has optional fields"
        fields = "\n".join(f"    {key}: {_py(field)}" for key, field in schema["properties"].items())
        text = schema.get("description")
        classes.append(f"class {name}(TypedDict):\n" + (f'    """{text}"""\n\n' if text else "") + fields)
    classes.append(f"{_UNION} = {' | '.join(sorted(members))}")
    return "\n\n".join(out) + "\n\n\n" + "\n\n\n".join(classes) + "\n"


if __name__ == "__main__":
    found = description()
    TYPESCRIPT.parent.mkdir(parents=True, exist_ok=True)
    TYPESCRIPT.write_text(typescript(found), encoding="utf-8")
    PYTHON.write_text(python(found), encoding="utf-8")
