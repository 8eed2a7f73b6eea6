"""Every route, and whom it lets in."""

from __future__ import annotations

import base64
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from gateway.access.caller import Scope
from tests.gateway.conftest import MakeDatabase
from tests.gateway.front_parts import (
    DATABASE_URL,
    JWT_SECRET,
    PROVIDER_SECRET,
    USER,
    Bench,
    open_bench,
)

VIEW = frozenset({"viewer"})
EDIT = frozenset({"editor"})
PUBLISH = frozenset({"publisher"})
ADMIN = frozenset({"admin"})
ANY = frozenset(Scope)

# Every route of the app. A route that is not here fails the test below; None: anybody.
NEEDED: dict[tuple[str, str], frozenset[str] | None] = {
    ("GET", "/health"): None,
    ("GET", "/"): ANY,
    ("GET", "/docs"): ANY,
    ("GET", "/openapi.json"): ANY,
    ("GET", "/metrics"): VIEW,
    ("GET", "/api/metrics"): VIEW,
    ("GET", "/api/cache/status"): VIEW,
    ("POST", "/refresh-prompt-cache"): ADMIN | {"worker"},
    ("POST", "/functions/v1/refresh-prompt-cache"): ADMIN | {"worker"},
    ("GET", "/api/llms"): VIEW | {"call"},
    ("POST", "/api/llms/refresh"): ADMIN | {"worker"},
    ("GET", "/api/prompts/{model}/{type}"): VIEW | {"worker"},
    ("GET", "/api/templates"): VIEW,
    ("POST", "/api/templates"): EDIT,
    ("GET", "/api/templates/{id}"): VIEW,
    ("PATCH", "/api/templates/{id}"): EDIT,
    ("GET", "/api/templates/{id}/versions"): VIEW,
    ("POST", "/api/templates/{id}/versions"): EDIT,
    ("GET", "/api/templates/{id}/versions/{version}"): VIEW,
    ("POST", "/api/templates/{id}/publish"): PUBLISH,
    ("GET", "/api/templates/{id}/diff"): VIEW,
    ("PUT", "/api/templates/{id}/labels/{label}"): EDIT,
    ("DELETE", "/api/templates/{id}/labels/{label}"): EDIT,
    ("POST", "/api/dry-run"): EDIT,
    ("GET", "/api/characters"): VIEW | {"call"},
    ("POST", "/api/characters"): EDIT | {"call"},
    ("GET", "/api/characters/{id}"): VIEW | {"call"},
    ("PATCH", "/api/characters/{id}"): EDIT | {"call"},
    ("DELETE", "/api/characters/{id}"): EDIT | {"call"},
    ("GET", "/api/me"): ANY,
    ("GET", "/api/keys"): ADMIN,
    ("POST", "/api/keys"): ADMIN,
    ("DELETE", "/api/keys/{id}"): ADMIN,
    ("GET", "/api/users"): ADMIN,
    ("POST", "/api/users"): ADMIN,
    ("PATCH", "/api/users/{id}"): ADMIN,
    ("GET", "/api/audit"): ADMIN,
    ("GET", "/api/audit/verify"): ADMIN,
    **{
        (method, f"/api/{name}{rest}"): needed
        for name, edits in (
            ("rules", EDIT),
            ("negative-prompts", EDIT),
            ("models", EDIT),
            ("assignments", EDIT),
            ("parameters", PUBLISH),
            ("providers", ADMIN),
        )
        for method, rest, needed in (
            ("GET", "", VIEW),
            ("POST", "", edits),
            ("GET", "/{id}", VIEW),
            ("PATCH", "/{id}", edits),
            ("DELETE", "/{id}", edits),
        )
    },
}

# What each credential of the bench holds, the implied scopes included.
HELD = {
    "call": {"call"},
    "worker": {"worker"},
    "viewer": {"viewer"},
    "editor": {"viewer", "editor"},
    "publisher": {"viewer", "editor", "publisher"},
    "admin": {"viewer", "editor", "publisher", "admin"},
    "service": {"call", "worker"},
    "user": {"call"},
    "admin user": {"call", "viewer", "editor", "publisher", "admin"},
    "anon": set(),
}
SAMPLES = {"version": "1", "label": "draft", "model": "sdxl", "type": "image"}


@pytest.fixture(scope="module")
def shared(tmp_path_factory: pytest.TempPathFactory, migrated_sqlite: Path) -> Iterator[Bench]:
    """One app for all questions that change nothing."""
    with open_bench(tmp_path_factory.mktemp("front"), migrated_sqlite) as made:
        yield made


@pytest.fixture
def bench(make_database: MakeDatabase, tmp_path: Path) -> Bench:
    made = Bench(make_database("sqlite"), tmp_path)
    made.edit_all()
    return made


def _routes(bench: Bench) -> set[tuple[str, str]]:
    return {
        (method, re.sub(r"<(?:[^<:]+:)?(\w+)>", r"{\1}", rule.rule))
        for rule in bench.app.url_map.iter_rules()
        for method in rule.methods or ()
        if method not in ("OPTIONS", "HEAD")
    }


def _path(template: str, row_id: str = "1") -> str:
    samples = {**SAMPLES, "id": USER if "/users/" in template else row_id}
    return re.sub(r"\{(\w+)\}", lambda match: samples[match[1]], template)


def test_every_route_says_here_whom_it_lets_in(shared: Bench) -> None:
    assert _routes(shared) == set(NEEDED)


@pytest.mark.parametrize("who", sorted(HELD))
def test_each_kind_of_caller_passes_exactly_the_routes_of_its_scopes(
    shared: Bench, who: str
) -> None:
    for (method, template), needed in sorted(NEEDED.items()):
        # A body of no route: those that are let in are told what is wrong with it, or are done.
        body: dict[str, Any] | None = {"no": 1} if method in ("POST", "PATCH", "PUT") else None
        answer = shared.ask(method, _path(template, "999"), who, body)
        may_pass = needed is None or bool(needed & HELD[who])

        assert (answer.status_code not in (401, 403)) == may_pass or (
            # The user's own rows: let in by scope, and refused as nobody's.
            answer.status_code == 403
            and "/api/characters" in template
            and who in ("call", "service")
        ), (method, template, answer.status_code, answer.text)


def test_without_a_key_only_health_answers(shared: Bench) -> None:
    for (method, template), needed in NEEDED.items():
        answer = shared.ask(method, _path(template), None)

        assert (answer.status_code == 401) == (needed is not None), (method, template)
        if needed is not None:
            assert "WWW-Authenticate" in answer.headers
            assert answer.json is not None
            assert answer.json["error_code"] == "unauthorized"


def test_a_wrong_key_is_401_everywhere_but_at_health(shared: Bench) -> None:
    for (method, template), needed in NEEDED.items():
        answer = shared.ask(method, _path(template), "wrong")

        assert answer.status_code == (401 if needed is not None else 200), (method, template)
    assert shared.ask("GET", "/no-such-route", "wrong").status_code == 401


def test_a_route_that_does_not_exist_is_404(shared: Bench) -> None:
    for who in (None, "admin", "anon"):
        answer = shared.ask("GET", "/no-such-route", who)

        assert answer.status_code == 404
        assert answer.json is not None
        assert answer.json["error_code"] == "not_found"


def test_health_does_not_look_at_credentials(shared: Bench) -> None:
    assert shared.ask("GET", "/health", "wrong").status_code == 200


def test_the_body_is_not_read_before_the_caller_is_known(shared: Bench) -> None:
    answer = shared.client.post("/api/rules", data=b"{not json", content_type="application/json")

    assert answer.status_code == 401


def test_pages_ask_a_browser_for_a_key_and_take_it(shared: Bench) -> None:
    pair = base64.b64encode(f":{shared.secrets['viewer']}".encode()).decode()

    for path in ("/", "/docs", "/openapi.json"):
        assert shared.ask("GET", path, None).headers["WWW-Authenticate"].startswith("Basic ")
        answer = shared.client.get(path, headers={"Authorization": f"Basic {pair}"})
        assert answer.status_code == 200
    refused = shared.client.get("/api/rules", headers={"Authorization": f"Basic {pair}"})
    assert refused.status_code == 401
    assert refused.headers["WWW-Authenticate"] == "Bearer"


def test_no_answer_has_a_secret(bench: Bench) -> None:
    secrets = [*bench.secrets.values(), JWT_SECRET, PROVIDER_SECRET, "pass-of-the-database"]
    assert "pass-of-the-database" in DATABASE_URL

    for (method, template), _ in sorted(NEEDED.items()):
        for who in ("admin", "admin user"):
            answer = bench.ask(method, _path(template), who)
            told = answer.text + str(answer.headers)
            assert not [one for one in secrets if one in told], (method, template)
            assert not re.search(r'"key_hash"', told)


def test_the_answer_that_makes_a_key_is_the_only_one_that_shows_it(bench: Bench) -> None:
    made = bench.ask("POST", "/api/keys", "admin", {"name": "app", "scopes": ["call"]})

    assert made.status_code == 201
    assert made.json is not None
    key = made.json["key"]
    bench.secrets["app"] = key
    assert bench.ask("GET", "/api/me", "app").status_code == 200
    assert key not in bench.ask("GET", "/api/keys").text
    assert key not in bench.ask("GET", "/api/audit").text


def test_a_revoked_key_is_refused_by_the_next_request(bench: Bench) -> None:
    made = bench.ask("POST", "/api/keys", "admin", {"name": "app", "scopes": ["viewer"]}).json
    assert made is not None
    bench.secrets["app"] = made["key"]
    assert bench.ask("GET", "/api/rules", "app").status_code == 200

    revoked = bench.ask("DELETE", f"/api/keys/{made['row']['id']}")

    assert revoked.status_code == 200
    assert revoked.json is not None
    assert not revoked.json["row"]["is_active"]
    assert bench.ask("GET", "/api/rules", "app").status_code == 401


def test_a_user_that_is_switched_off_is_refused_by_the_next_request(bench: Bench) -> None:
    assert bench.ask("GET", "/api/me", "user").status_code == 200

    bench.ask("PATCH", f"/api/users/{USER}", "admin", {"is_active": False})

    assert bench.ask("GET", "/api/me", "user").status_code == 401


def test_rights_of_a_user_count_at_once(bench: Bench) -> None:
    before = bench.ask("GET", "/api/me", "user").json
    bench.ask("PATCH", f"/api/users/{USER}", "admin", {"may_use_nsfw": True, "tier": "pro"})
    after = bench.ask("GET", "/api/me", "user").json

    assert before is not None and after is not None
    assert (before["may_use_nsfw"], before["tier"]) == (False, "*")
    assert (after["may_use_nsfw"], after["tier"]) == (True, "pro")


def test_an_address_of_a_user_is_not_in_the_audit_log(bench: Bench) -> None:
    made = bench.ask("POST", "/api/users", "admin", {"email": "someone@example.com"})

    assert made.status_code == 201
    assert "someone@example.com" in bench.ask("GET", "/api/users").text
    assert "someone@example.com" not in bench.ask("GET", "/api/audit").text


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/api/keys", {"name": "x", "scopes": ["root"]}),
        ("/api/keys", {"name": "x", "scopes": []}),
        ("/api/keys", {"name": "", "scopes": ["call"]}),
        ("/api/keys", {"name": "x", "scopes": ["call"], "user_id": "7"}),
        ("/api/keys", {"name": "x", "scopes": ["call"], "expires_at": "2020-01-01T00:00:00Z"}),
        ("/api/keys", {"name": "x", "scopes": ["call"], "expires_at": "2027-01-01T00:00:00"}),
        ("/api/keys", {"name": "x", "scopes": ["call"], "secret": "mine"}),
        ("/api/users", {"id": "7"}),
        ("/api/users", {"content_mode": "adult"}),
    ],
    ids=str,
)
def test_keys_and_users_that_cannot_be_are_refused(
    shared: Bench, path: str, body: dict[str, Any]
) -> None:
    answer = shared.ask("POST", path, "admin", body)

    assert answer.status_code in (400, 422), answer.text


def test_keys_users_and_the_audit_log_are_listed_page_by_page(bench: Bench) -> None:
    for path, key in (("/api/keys", "id"), ("/api/users", "id"), ("/api/audit", "id")):
        whole = bench.ask("GET", f"{path}?limit=200").json
        assert whole is not None and whole["next"] is None
        found: list[Any] = []
        cursor = ""
        while cursor is not None:
            more = f"&cursor={cursor}" if cursor else ""
            page = bench.ask("GET", f"{path}?limit=2{more}").json
            assert page is not None
            found += [row[key] for row in page["rows"]]
            cursor = page["next"]

        assert found == [row[key] for row in whole["rows"]]
        assert len(found) >= 3


def test_the_audit_log_says_when_it_is_not_whole(bench: Bench) -> None:
    whole = bench.ask("GET", "/api/audit/verify").json
    with bench.database.transaction() as connection:
        # As somebody with the file in hand would do it.
        triggers = connection.exec_driver_sql(
            "SELECT name FROM sqlite_master WHERE type = 'trigger' AND tbl_name = 'audit_log'"
        )
        for (name,) in triggers.all():
            connection.exec_driver_sql(f"DROP TRIGGER {name}")
        connection.exec_driver_sql("UPDATE audit_log SET actor = 'somebody else' WHERE id = 2")
    broken = bench.ask("GET", "/api/audit/verify").json

    assert whole is not None and broken is not None
    assert (whole["whole"], whole["broken_id"]) == (True, None)
    assert (broken["whole"], broken["broken_id"]) == (False, 2)
