"""The page `/docs`: the OpenAPI document as HTML, with its style inside, so that a browser loads nothing else."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Iterator, Mapping
from html import escape
from typing import Any

_STYLE = (
    "body{font:16px/1.5 sans-serif;max-width:60em;margin:2em auto;padding:0 1em}code{background:#8882;padding:0 .2em}"
    "table{border-collapse:collapse}td,th{text-align:left;vertical-align:top;padding:.1em 1em .1em 0}"
    "h3{margin-top:2em}:root{color-scheme:light dark}"
)
_STYLE_HASH = base64.b64encode(hashlib.sha256(_STYLE.encode()).digest()).decode()
HEADERS: Mapping[str, str] = {
    "content-security-policy": f"default-src 'none'; style-src 'sha256-{_STYLE_HASH}'; base-uri 'none'; frame-ancestors 'none'"
}
"""The headers of the page: no scripts, and no style but its own."""


def render_docs(document: Mapping[str, Any]) -> str:
    """The page of an OpenAPI document."""
    title = escape(f"{document['info']['title']} {document['info']['version']}")
    routes = "".join(
        _route(method, path, operation)
        for path, operations in document["paths"].items()
        for method, operation in operations.items()
    )
    schemas = document.get("components", {}).get("schemas", {})
    objects = "".join(_object(name, schema) for name, schema in sorted(schemas.items()))
    return (
        f"<!doctype html><html lang=en><meta charset=utf-8><title>{title}</title><style>{_STYLE}</style><h1>{title}</h1>"
        "<p>Send a key as <code>Authorization: Bearer KEY</code> if the server has keys. "
        f"This page for programs: <a href=openapi.json>openapi.json</a></p><h2>Routes</h2>{routes}<h2>Objects</h2>{objects}"
    )


def _route(method: str, path: str, operation: Mapping[str, Any]) -> str:
    rows = [
        _row(
            each["name"], each.get("schema", {}), each.get("description", each["in"]), is_required=each.get("required")
        )
        for each in operation.get("parameters", ())
    ]
    for content in operation.get("requestBody", {}).get("content", {}).values():
        rows.append(_row("body", content.get("schema", {}), "JSON", is_required=True))
    what = escape(operation.get("description", ""))
    return f"<h3><code>{escape(method.upper())} {escape(path)}</code></h3><p>{what}</p>{_table(rows)}"


def _object(name: str, schema: Mapping[str, Any]) -> str:
    required = schema.get("required", ())
    rows = [
        _row(field, each, each.get("description", ""), is_required=field in required)
        for field, each in schema.get("properties", {}).items()
    ]
    what = escape(schema.get("description", ""))
    return f'<h3 id="{escape(name)}"><code>{escape(name)}</code></h3><p>{what}</p>{_table(rows)}'


def _table(rows: list[str]) -> str:
    return f"<table>{''.join(rows)}</table>" if rows else ""


def _row(name: str, schema: Mapping[str, Any], what: str, *, is_required: Any) -> str:
    mark = " *" if is_required else ""
    return f"<tr><td><code>{escape(name)}</code>{mark}<td>{' or '.join(_types(schema))}<td>{escape(what)}"


def _types(schema: Mapping[str, Any]) -> Iterator[str]:
    """The alternatives that a schema allows, as HTML."""
    if "$ref" in schema:
        name = escape(schema["$ref"].rpartition("/")[2])
        yield f'<a href="#{name}">{name}</a>'
    for each in (*schema.get("anyOf", ()), *schema.get("oneOf", ())):
        yield from _types(each)
    for value in (*schema.get("enum", ()), *([schema["const"]] if "const" in schema else ())):
        yield f"<code>{escape(repr(value))}</code>"
    if schema.get("type") == "array":
        yield f"list of {' or '.join(_types(schema.get('items', {}))) or 'anything'}"
    elif "type" in schema and not {"enum", "const"} & schema.keys():
        yield escape(str(schema["type"]))
