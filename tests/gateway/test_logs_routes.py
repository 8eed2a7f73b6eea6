"""The log over HTTP: viewers see what happened, and only some what was written."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.access.caller import Scope
from gateway.access.keys import create_key
from gateway.front import log_routes
from gateway.store.database import Database
from tests.gateway.front_parts import NOW, OTHER, USER, Bench
from tests.gateway.log_parts import entry, with_body, write


@pytest.fixture
def bench(database: Database, tmp_path: Path) -> Bench:
    bench = Bench(database, tmp_path, (), (log_routes.blueprint,))
    with database.transaction() as connection:
        for name, user_id in (("own viewer", USER), ("other viewer", OTHER)):
            _, bench.secrets[name] = create_key(
                connection,
                name=name,
                scopes=frozenset({Scope.VIEWER}),
                now=NOW,
                user_id=user_id,
            )
    return bench


def told(bench: Bench, path: str, who: str | None = "viewer", status: int = 200) -> dict[str, Any]:
    answer = bench.ask("GET", path, who)
    assert answer.status_code == status, answer.text
    found: dict[str, Any] = answer.get_json()
    return found


def test_pages_follow_each_other_by_their_cursors(bench: Bench) -> None:
    write(bench.database, *(entry(f"r{n}", n, template_name="a") for n in range(5)))

    first = told(bench, "/api/logs?limit=3&template_name=a")
    second = told(bench, f"/api/logs?limit=3&template_name=a&cursor={first['next']}")

    assert [row["request_id"] for row in first["rows"]] == ["r0", "r1", "r2"]
    assert [row["request_id"] for row in second["rows"]] == ["r3", "r4"]
    assert (first["count"], second["next"]) == (3, None)
    assert first["rows"][0]["created_at"] == "2026-11-26T12:00:00+00:00"


@pytest.mark.parametrize(
    ("query", "found"),
    [
        ("error_code=worker_busy", ["busy"]),
        ("flag=f1", ["two", "one"]),
        ("flag=f1&flag=f2", ["two"]),
        ("fallback_level=2", ["busy"]),
        ("since=2026-11-26T11:59:58Z&until=2026-11-26T12:00:00Z", ["one", "busy"]),
        ("since=2026-11-26T12:59:58%2B01:00", ["two", "one", "busy"]),
        ("request_id=one", ["one"]),
        ("user_id=nobody", []),
    ],
)
def test_filters_come_from_the_query(bench: Bench, query: str, found: list[str]) -> None:
    write(
        bench.database,
        entry("two", 0, flags=("f1", "f2")),
        entry("one", 1, flags=("f1",)),
        entry("busy", 2, error_code="worker_busy", status=503, fallback_level=2),
        entry("old", 60),
    )

    assert [row["request_id"] for row in told(bench, f"/api/logs?{query}")["rows"]] == found


@pytest.mark.parametrize(
    ("query", "status"),
    [
        ("limit=0", 422),
        ("limit=201", 422),
        ("cursor=x", 400),
        ("since=2026-11-26T11:59:58", 422),
        ("since=0001-01-01T00:00:00%2B14:00", 422),
        ("until=9999-12-31T23:59:59-14:00", 422),
        ("fallback_level=3", 422),
        ("flag=a&flag=b&flag=c&flag=d&flag=e&flag=f", 422),
    ],
)
def test_what_cannot_be_asked_is_refused(bench: Bench, query: str, status: int) -> None:
    found = told(bench, f"/api/logs?{query}", status=status)

    assert found["success"] is False
    assert "under this id" not in found["error"]  # it says what is wrong


@pytest.mark.parametrize(
    ("who", "may_read"),
    [
        ("viewer", False),
        ("editor", False),
        ("other viewer", False),
        ("own viewer", True),
        ("admin", True),
        ("admin user", True),
    ],
)
def test_texts_are_for_admins_and_for_whose_request_it_was(
    bench: Bench, who: str, may_read: bool
) -> None:
    write(bench.database, with_body("r1", user_id=USER))

    answer = bench.ask("GET", "/api/logs/r1", who)

    found = answer.get_json()
    assert (found["row"]["request_id"], found["has_texts"]) == ("r1", True)
    assert ("body" in found, "objects" in found) == (may_read, may_read)
    assert ("harbour" in answer.text) is may_read


def test_rows_of_nobody_are_not_those_of_a_key_of_nobody(bench: Bench) -> None:
    write(bench.database, with_body("r1", user_id=None))

    assert "body" not in told(bench, "/api/logs/r1", "viewer")


@pytest.mark.parametrize("path", ["/api/logs", "/api/logs/r1", "/api/logs/r1/replay"])
def test_the_log_is_for_viewers(bench: Bench, path: str) -> None:
    write(bench.database, with_body("r1"))

    assert told(bench, path, None, 401)["error_code"] == "unauthorized"
    for who in ("call", "worker", "user"):
        assert told(bench, path, who, 403)["error_code"] == "forbidden"


def test_a_replay_tells_hashes_and_no_texts(bench: Bench) -> None:
    write(bench.database, with_body("r1"))

    answer = bench.ask("GET", "/api/logs/r1/replay", "viewer")

    found = answer.get_json()
    assert set(found) == {
        "success",
        "request_id",
        "same",
        "logged",
        "recomputed",
        "differences",
    }
    assert found["same"] is False  # no configuration was kept with it
    assert "harbour" not in answer.text


@pytest.mark.parametrize("path", ["/api/logs/none", "/api/logs/none/replay"])
def test_a_request_that_is_not_there_is_404(bench: Bench, path: str) -> None:
    assert told(bench, path, status=404)["error_code"] == "not_found"
