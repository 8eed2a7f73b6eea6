"""Whom each route lets in, of every module of the front, also of those that the composition root
adds. A route that is in no table fails."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType
from typing import Any
from unittest.mock import MagicMock

import pytest
from flask import Flask
from flask_openapi3.blueprint import APIBlueprint

import gateway.front
from gateway.access.caller import Scope
from gateway.front.access import needed_by
from gateway.front.openapi import base_app
from tests.gateway.front_parts import Bench, open_bench
from tests.gateway.test_front_access import NEEDED

CALL = frozenset({Scope.CALL})
# Routes that need more than the services. None: what lets a caller in is not a scope.
ADDED: dict[tuple[str, str], frozenset[Scope] | None] = {
    ("POST", "/enhance-prompt"): CALL,
    ("POST", "/playground-chat"): CALL,
    ("POST", "/get-negative-prompt"): CALL | {Scope.VIEWER},
    ("POST", "/enhance/sdxl"): CALL,
    ("POST", "/enhance/wan"): CALL,
    ("POST", "/enhance/universal"): CALL,
    ("GET", "/enhancement/info"): CALL | {Scope.VIEWER},
    ("POST", "/queue-job"): CALL,
    ("POST", "/job-callback"): None,  # its signature
    ("POST", "/process-job"): CALL,
    ("GET", "/jobs"): CALL,
    ("GET", "/jobs/{job_id}"): CALL,
    ("DELETE", "/jobs/{job_id}"): CALL,
    ("GET", "/api/logs"): frozenset({Scope.VIEWER}),
    ("GET", "/api/logs/{request_id}"): frozenset({Scope.VIEWER}),
    ("GET", "/api/logs/{request_id}/replay"): frozenset({Scope.VIEWER}),
    ("POST", "/register-chat-worker"): frozenset({Scope.WORKER, Scope.ADMIN}),
    ("POST", "/update-worker-url"): frozenset({Scope.WORKER, Scope.ADMIN}),
    ("POST", "/get-active-worker-url"): CALL | {Scope.WORKER, Scope.VIEWER},
    ("POST", "/health-check-workers"): frozenset({Scope.WORKER, Scope.VIEWER}),
}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("front"), migrated_sqlite) as made:
        yield made


def _modules() -> list[ModuleType]:
    found = pkgutil.iter_modules(gateway.front.__path__)
    return [importlib.import_module(f"gateway.front.{one.name}") for one in found]


def _apps(bench: Bench) -> Iterator[Flask]:
    """An app for each blueprint of the front, and the one of all that needs only the services."""
    yield bench.app
    for module in _modules():
        for name, make in vars(module).items():
            if not name.endswith("blueprint") or name.startswith("_"):
                continue
            if getattr(make, "__module__", None) != module.__name__:
                continue
            app = base_app(name)
            made = make(*(_part(bench, one) for one in inspect.signature(make).parameters))
            if isinstance(made, APIBlueprint):
                app.register_api(made)
            else:
                app.register_blueprint(made)
            yield app


def _part(bench: Bench, name: str) -> Any:
    return bench.services if name == "services" else MagicMock()


def _needed(bench: Bench) -> dict[tuple[str, str], frozenset[Scope] | None]:
    return {
        (method, re.sub(r"<(?:[^<:]+:)?(\w+)>", r"{\1}", rule.rule)): needed_by(
            app.view_functions[rule.endpoint]
        )
        for app in _apps(bench)
        for rule in app.url_map.iter_rules()
        for method in rule.methods or ()
        if method not in ("OPTIONS", "HEAD")
    }


def test_every_route_of_the_front_is_in_a_table_with_what_it_needs(bench: Bench) -> None:
    assert _needed(bench) == {**NEEDED, **ADDED}


def test_nothing_is_open_but_health_and_what_is_signed() -> None:
    is_open = {route for route, needed in {**NEEDED, **ADDED}.items() if needed is None}

    assert is_open == {("GET", "/health"), ("POST", "/job-callback")}


def test_function_routes_have_bodies_of_different_names(bench: Bench) -> None:
    """The document files schemas by name: of two models with one name, one would be lost."""
    models: dict[str, set[int]] = {}
    for app in _apps(bench):
        for name, schema in getattr(app, "components_schemas", {}).items():
            models.setdefault(name, set()).add(hash(schema.model_dump_json()))

    assert [name for name, shapes in models.items() if len(shapes) > 1] == []
