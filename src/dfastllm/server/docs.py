"""GET /docs: the OpenAPI description as one plain page. FastAPI's own page loads its script and style from a content
network; this one loads nothing, so it works on a machine without internet and under any content policy."""

from __future__ import annotations

import json
from collections.abc import Mapping
from html import escape
from typing import Any

__all__ = ["docs_page", "type_expression"]

_STYLE = """
:root { color-scheme: light dark; --line: #8884; --soft: #8881; --accent: #2563eb; }
body { font: 16px/1.5 system-ui, sans-serif; max-width: 62rem; margin: 2rem auto; padding: 0 1rem; }
code, .path { font-family: ui-monospace, monospace; font-size: .92em; }
details { border: 1px solid var(--line); border-radius: .5rem; margin: .5rem 0; padding: .5rem .9rem; }
summary { cursor: pointer; }
summary b { display: inline-block; min-width: 4.5rem; color: var(--accent); }
table { border-collapse: collapse; width: 100%; margin: .6rem 0; }
th, td { text-align: left; vertical-align: top; padding: .3rem .6rem; border-bottom: 1px solid var(--line); }
pre { background: var(--soft); border-radius: .4rem; padding: .7rem .9rem; overflow-x: auto; }
.soft { opacity: .75; }
"""


def docs_page(api: Mapping[str, Any]) -> str:
    schemas = api.get("components", {}).get("schemas", {})
    parts = [
        f"<h1>{escape(api['info']['title'])} <span class=soft>{escape(api['info']['version'])}</span></h1>",
        f"<p>{escape(api['info'].get('description', ''))} Machine-readable: "
        '<a href="openapi.json">openapi.json</a>.</p>',
    ]
    for path, methods in api["paths"].items():
        for method, operation in methods.items():
            parts.append(_operation(path, method.upper(), operation, schemas))
    body = "\n".join(parts)
    return (
        "<!doctype html><html lang=en><head><meta charset=utf-8>"
        '<meta name=viewport content="width=device-width, initial-scale=1"><link rel=icon href="data:,">'
        f"<title>{escape(api['info']['title'])}</title><style>{_STYLE}</style></head><body>{body}</body></html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    head = f"<summary><b>{method}</b> <span class=path>{escape(path)}</span> "
    head += f"<span class=soft>{escape(operation.get('description', ''))}</span></summary>"
    body = ""
    content = operation.get("requestBody", {}).get("content", {}).get("application/json", {})
    if "$ref" in content.get("schema", {}):
        body = _fields(content["schema"], schemas)
        for example in _resolved(content["schema"], schemas).get("examples", ()):
            body += f"<pre>{escape(json.dumps(example, ensure_ascii=False, indent=2))}</pre>"
    return f"<details>{head}{body}</details>"


def _resolved(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> Mapping[str, Any]:
    found: Mapping[str, Any] = schemas[schema["$ref"].rpartition("/")[2]]
    return found


def _fields(schema: Mapping[str, Any], schemas: Mapping[str, Any]) -> str:
    resolved = _resolved(schema, schemas)
    required = set(resolved.get("required", ()))
    rows = []
    for name, field in resolved.get("properties", {}).items():
        need = " <b>required</b>" if name in required else ""
        rows.append(
            f"<tr><td><code>{escape(name)}</code>{need}</td><td><code>{escape(type_expression(field))}</code></td>"
            f"<td>{escape(field.get('description', ''))}</td></tr>"
        )
    return f"<table><tr><th>field</th><th>type</th><th>meaning</th></tr>{''.join(rows)}</table>"


def type_expression(field: Mapping[str, Any]) -> str:
    """A JSON schema as a short type expression; null, which only means "not given", is left out."""
    if "$ref" in field:
        return str(field["$ref"].rpartition("/")[2])
    if "anyOf" in field:
        return " | ".join(dict.fromkeys(t for t in map(type_expression, field["anyOf"]) if t != "null"))
    if "const" in field:
        return repr(field["const"])
    if "enum" in field:
        return " | ".join(map(repr, field["enum"]))
    kind = str(field.get("type", "any"))
    return f"list[{type_expression(field['items'])}]" if kind == "array" and "items" in field else kind
