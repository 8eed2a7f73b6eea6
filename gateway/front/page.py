"""The OpenAPI document, and a page that shows it: plain HTML, no script, nothing from elsewhere."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from html import escape
from typing import Any

from flask import Blueprint, Response, jsonify
from flask.typing import ResponseReturnValue

from gateway.access.caller import Scope
from gateway.front.access import for_browsers, needs

_STYLE = """
:root { color-scheme: light dark; font: 16px/1.5 system-ui, sans-serif; }
body { max-width: 60rem; margin: 2rem auto; padding: 0 1rem; }
details { border: 1px solid color-mix(in srgb, currentColor 25%, transparent); margin: .3rem 0; }
summary { cursor: pointer; padding: .4rem .6rem; display: flex; gap: .8rem; flex-wrap: wrap; }
summary b { min-width: 4rem; }
summary code { flex: 1; overflow-wrap: anywhere; }
summary span { flex-basis: 100%; opacity: .75; }
pre { margin: 0; padding: .6rem; overflow-x: auto; font-size: .85rem; }
"""
# `style-src` lets this page's own style in; a document of ours needs nothing else.
POLICY = "default-src 'none'; style-src 'unsafe-inline'; base-uri 'none'; frame-ancestors 'none'"


def blueprint(document: Callable[[], Mapping[str, Any]]) -> Blueprint:
    """document: the OpenAPI document, asked for at each request."""
    pages = Blueprint("pages", __name__)

    @pages.get("/openapi.json")
    @for_browsers
    @needs(*Scope)
    def openapi() -> ResponseReturnValue:
        return jsonify(document())

    @pages.get("/", endpoint="root")
    @pages.get("/docs", endpoint="docs")
    @for_browsers
    @needs(*Scope)
    def docs() -> ResponseReturnValue:
        answer = Response(render(document()), content_type="text/html; charset=utf-8")
        answer.headers["Content-Security-Policy"] = POLICY
        return answer

    return pages


def render(document: Mapping[str, Any]) -> str:
    """The page of a document. Every text of it is escaped."""
    info = document["info"]
    title = escape(f"{info['title']} {info['version']}")
    operations = "\n".join(
        _operation(path, method, operation)
        for path, item in document["paths"].items()
        for method, operation in item.items()
    )
    schemas = "\n".join(
        f"<details><summary><code>{escape(name)}</code></summary>{_pre(schema)}</details>"
        for name, schema in sorted(document["components"]["schemas"].items())
    )
    return (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f"<title>{title}</title><style>{_STYLE}</style></head><body><h1>{title}</h1>"
        '<p>The document itself: <a href="openapi.json">openapi.json</a>.</p>'
        f"<h2>Routes</h2>{operations}<h2>Schemas</h2>{schemas}</body></html>"
    )


def _operation(path: str, method: str, operation: Mapping[str, Any]) -> str:
    scopes = [
        name for one in operation.get("security", ()) for names in one.values() for name in names
    ]
    needed = " or ".join(scopes) if scopes else "open"
    return (
        f"<details><summary><b>{escape(method.upper())}</b><code>{escape(path)}</code>"
        f"<i>{escape(needed)}</i><span>{escape(str(operation.get('summary', '')))}</span></summary>"
        f"{_pre(operation)}</details>"
    )


def _pre(value: Any) -> str:
    return f"<pre>{escape(json.dumps(value, indent=2, ensure_ascii=False))}</pre>"
