"""The OpenAPI document and the page that shows it."""

from __future__ import annotations

import re
from collections.abc import Iterator
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest

from gateway.front.openapi import document
from gateway.front.page import render
from tests.gateway.front_parts import Bench, open_bench
from tests.gateway.test_front_access import NEEDED

METHODS = {"get", "put", "post", "delete", "options", "head", "patch", "trace"}
PAGES = {"/", "/docs", "/openapi.json"}


@pytest.fixture(scope="module")
def bench(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Bench]:
    with open_bench(tmp_path_factory.mktemp("front"), migrated_sqlite) as made:
        yield made


@pytest.fixture(scope="module")
def told(bench: Bench) -> dict[str, Any]:
    found = bench.ask("GET", "/openapi.json", "viewer").json
    assert isinstance(found, dict)
    return found


def _operations(told: dict[str, Any]) -> list[tuple[str, str, dict[str, Any]]]:
    return [
        (path, method, operation)
        for path, item in told["paths"].items()
        for method, operation in item.items()
    ]


def test_it_is_an_openapi_3_1_document(told: dict[str, Any]) -> None:
    assert re.fullmatch(r"3\.1\.\d+", told["openapi"])
    assert set(told) <= {
        "openapi",
        "info",
        "jsonSchemaDialect",
        "servers",
        "paths",
        "webhooks",
        "components",
        "security",
        "tags",
        "externalDocs",
    }
    assert told["info"]["title"] and told["info"]["version"]


def test_it_has_every_route_but_the_pages(told: dict[str, Any]) -> None:
    documented = {(method.upper(), path) for path, method, _ in _operations(told)}

    assert documented == {route for route in NEEDED if route[1] not in PAGES}


def test_operations_are_whole(told: dict[str, Any]) -> None:
    for path, method, operation in _operations(told):
        assert method in METHODS
        assert operation["summary"], (path, method)
        assert operation["responses"]
        for status, answer in operation["responses"].items():
            assert status == "default" or re.fullmatch(r"[1-5]\d\d", status)
            assert isinstance(answer["description"], str)
        for parameter in operation.get("parameters", ()):
            assert parameter["in"] in ("path", "query", "header", "cookie")
            assert "schema" in parameter
            if parameter["in"] == "path":
                assert parameter["required"] is True


def test_parameters_of_a_path_are_those_in_its_text(told: dict[str, Any]) -> None:
    for path, method, operation in _operations(told):
        named = set(re.findall(r"\{(\w+)\}", path))
        listed = {one["name"] for one in operation.get("parameters", ()) if one["in"] == "path"}

        assert named == listed, (path, method)


def test_ids_of_operations_are_unique(told: dict[str, Any]) -> None:
    ids = [operation["operationId"] for _, _, operation in _operations(told)]

    assert len(ids) == len(set(ids))
    assert all(re.fullmatch(r"[a-z0-9A-Z_]+", one) for one in ids)


def test_scopes_of_each_operation_are_those_that_are_enforced(told: dict[str, Any]) -> None:
    for path, method, operation in _operations(told):
        needed = NEEDED[(method.upper(), path)]

        if needed is None:
            assert operation["security"] == []
        else:
            assert operation["security"] == [{"bearer": sorted(needed)}]
            assert {"401", "403"} <= set(operation["responses"])
    assert told["components"]["securitySchemes"]["bearer"]["scheme"] == "bearer"


def test_every_reference_leads_somewhere(told: dict[str, Any]) -> None:
    def references(value: Any) -> list[str]:
        if isinstance(value, dict):
            own = [value["$ref"]] if isinstance(value.get("$ref"), str) else []
            return own + [one for inner in value.values() for one in references(inner)]
        if isinstance(value, list):
            return [one for inner in value for one in references(inner)]
        return []

    found = references(told)

    assert found
    for reference in found:
        place: Any = told
        for part in reference.removeprefix("#/").split("/"):
            place = place[part]


def test_every_edit_describes_its_body(told: dict[str, Any]) -> None:
    for path, method, operation in _operations(told):
        if method in ("post", "put", "patch"):
            content = operation["requestBody"]["content"]
            assert list(content) == ["application/json"], (path, method)


def test_bodies_of_two_routes_do_not_hide_each_other(told: dict[str, Any]) -> None:
    """Schemas are filed by the name of their model; two models of one name would be one."""
    schemas = told["components"]["schemas"]

    assert "body" in schemas["RuleCreate"]["properties"]
    assert "params" in schemas["ParametersCreate"]["properties"]
    assert "expected_revision" in schemas["RuleChange"]["properties"]
    assert "required" not in schemas["RuleChange"]
    assert "system_prompt" not in schemas["TemplateChange"]["properties"]
    assert "system_prompt" in schemas["VersionCreate"]["properties"]


def test_asking_twice_gives_the_same_document(bench: Bench, told: dict[str, Any]) -> None:
    assert bench.ask("GET", "/openapi.json", "viewer").json == told


class _Links(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.tags: set[str] = set()
        self.places: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.add(tag)
        self.places += [value or "" for name, value in attrs if name in ("src", "href", "action")]


def test_the_page_shows_every_route_and_loads_nothing(bench: Bench) -> None:
    for path in ("/", "/docs"):
        answer = bench.ask("GET", path, "viewer")
        links = _Links()
        links.feed(answer.text)

        assert answer.content_type == "text/html; charset=utf-8"
        assert links.places == ["openapi.json"]
        assert not links.tags & {"script", "img", "iframe", "link", "form", "object"}
        for method, route in NEEDED:
            assert route in PAGES or f"<b>{method}</b><code>{route}</code>" in answer.text


def test_texts_of_the_document_cannot_break_out_of_the_page(bench: Bench) -> None:
    told = document(bench.app)
    told["paths"] = {
        "/<script>": {"get": {"summary": "</pre><script>alert(1)</script>", "responses": {}}}
    }

    assert "<script>" not in render(told)
