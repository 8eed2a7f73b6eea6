"""The OpenAPI 3.1 document of the app, in the state that its routes are in."""

from __future__ import annotations

import copy
import re
from collections.abc import Callable
from typing import Any

from flask import Flask
from flask_openapi3.models.info import Info
from flask_openapi3.openapi import OpenAPI

from gateway.front.access import needed_by

CONTRACT = "1.0.0"  # of these routes; not of the program
BEARER = "bearer"
_METHODS = ("get", "post", "put", "patch", "delete")
_ERROR = {
    "type": "object",
    "required": ["success", "error", "error_code", "request_id"],
    "properties": {
        "success": {"const": False},
        "error": {"type": "string"},
        "error_code": {"type": "string"},
        "request_id": {"type": "string"},
        "retry_after_s": {"type": "number"},
    },
}


def base_app(name: str) -> OpenAPI:
    """A Flask app that collects its routes' descriptions, without the library's own pages: those
    load scripts from elsewhere or need packages that nothing else here needs."""
    return OpenAPI(
        name,
        info=Info(title="Prompt gateway", version=CONTRACT),
        security_schemes={
            BEARER: {
                "type": "http",
                "scheme": "bearer",
                "description": "An API key, a user's token, or the service key.",
            }
        },
        doc_ui=False,
        static_folder=None,
    )


def document(app: OpenAPI) -> dict[str, Any]:
    """The document: the library's, with what it cannot know: scopes, our error shape, and ids that
    are unique though a function route exists twice."""
    told = copy.deepcopy(app.api_doc)
    views = _views(app)
    told["paths"] = {path: told["paths"][path] for path in sorted(told["paths"])}
    for path, item in told["paths"].items():
        for method, operation in item.items():
            if method not in _METHODS:
                continue
            operation["operationId"] = operation_id(method, path)
            needed = needed_by(views[(path, method)])
            operation["security"] = [] if needed is None else [{BEARER: sorted(needed)}]
            operation["responses"] = _responses(operation.get("responses", {}), needed is None)
    schemas = told.setdefault("components", {}).setdefault("schemas", {})
    schemas.pop(app.validation_error_model.__name__, None)
    schemas["Error"] = _ERROR
    return told


def operation_id(method: str, path: str) -> str:
    """Unique and stable: `post_functions_v1_enhance_prompt`."""
    return f"{method}_{re.sub(r'[^A-Za-z0-9]+', '_', path).strip('_')}".rstrip("_")


def _responses(found: dict[str, Any], is_open: bool) -> dict[str, Any]:
    error = {
        "description": "Refused or failed; the code says why",
        "content": {"application/json": {"schema": {"$ref": "#/components/schemas/Error"}}},
    }
    # The library's 422 describes the library's own answer, which is not ours.
    kept = {status: one for status, one in found.items() if status != "422"}
    kept.setdefault("200", {"description": "Done"})
    kept["default"] = error
    if not is_open:
        kept.setdefault("401", {**error, "description": "No key, or a wrong one"})
        kept.setdefault("403", {**error, "description": "The caller lacks the scope"})
    return dict(sorted(kept.items()))


def _views(app: Flask) -> dict[tuple[str, str], Callable[..., Any]]:
    return {
        (re.sub(r"<(?:[^<:]+:)?(\w+)>", r"{\1}", rule.rule), method.lower()): app.view_functions[
            rule.endpoint
        ]
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
    }
