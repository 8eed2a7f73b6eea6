"""Edits over HTTP: revisions, scopes by what an edit touches, and what is answered."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.access.caller import Scope
from gateway.access.keys import create_key
from gateway.front.admin_rows import RESOURCES
from gateway.store.database import Database
from tests.gateway.conftest import MakeDatabase
from tests.gateway.front_parts import NOW, OTHER, TEMPLATE, USER, Bench

RULE = {"name": "light", "rule_type": "append", "slot": "system", "body": "Mind the light."}
VERSION = {"system_prompt": "Describe the light."}
# A row of each resource, and a change of it.
ROWS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rules": (RULE, {"body": "Mind the shadow.", "tags": ["dark"]}),
    "parameters": ({"profile": "high", "params": {"temperature": 0.5}}, {"params": {"top_p": 0.8}}),
    "negative-prompts": (
        {"target_model": "sdxl", "content_mode": "sfw", "negative_prompt": "blurry"},
        {"priority": 7},
    ),
    "providers": (
        {"name": "local", "kind": "openai", "base_url": "http://localhost:8000/v1"},
        {"secret_ref": "LOCAL_API_KEY"},
    ),
    "models": (
        {"provider": "openrouter", "external_id": "x/y", "model_name": "Y", "model_key": "x/y"},
        {"model_name": "Why", "capabilities": {"context_length": 4096}},
    ),
    "assignments": (
        {"model_key": "qwen_instruct", "display_name": "Q", "modality": "chat", "task": "chat"},
        {"priority": 3},
    ),
}


@pytest.fixture
def bench(make_database: MakeDatabase, tmp_path: Path) -> Bench:
    made = Bench(make_database("sqlite"), tmp_path)
    made.edit_all()
    return made


def _ok(answer: Any, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json, dict)
    assert answer.json["success"] is True
    return answer.json


def test_every_resource_has_a_row_here() -> None:
    assert set(ROWS) == {one.name for one in RESOURCES}


@pytest.mark.parametrize("name", sorted(ROWS))
def test_rows_are_made_read_changed_and_deleted(
    database: Database, tmp_path: Path, name: str
) -> None:
    bench = Bench(database, tmp_path)
    bench.edit_all()
    row, change = ROWS[name]
    path = f"/api/{name}"
    before = _ok(bench.ask("GET", path))

    made = _ok(bench.ask("POST", path, "admin", row), 201)
    one = _ok(bench.ask("GET", f"{path}/{made['id']}", "viewer"))
    changed = _ok(bench.ask("PATCH", f"{path}/{made['id']}", "admin", change))
    same = _ok(bench.ask("PATCH", f"{path}/{made['id']}", "admin", change))
    two = _ok(bench.ask("GET", f"{path}/{made['id']}"))
    removed = _ok(bench.ask("DELETE", f"{path}/{made['id']}"))

    assert before["revision"] < made["revision"] == one["revision"]
    assert {key: one["row"][key] for key in row if key != "provider"} == {
        key: value for key, value in row.items() if key != "provider"
    }
    assert (changed["changed"], same["changed"]) == (True, False)
    assert same["revision"] == changed["revision"] > made["revision"]
    for key, value in change.items():
        assert two["row"][key] == value
    assert removed["revision"] > changed["revision"]
    assert bench.ask("GET", f"{path}/{made['id']}").status_code == 404
    assert _ok(bench.ask("GET", path))["rows"] == before["rows"]
    assert bench.prompts.woken == 4


def test_templates_go_from_draft_to_live_on_both_engines(
    database: Database, tmp_path: Path
) -> None:
    bench = Bench(database, tmp_path)
    bench.edit_all()
    path = "/api/templates/1"

    draft = _ok(
        bench.ask("POST", f"{path}/versions", "editor", {**VERSION, "message": "light"}), 201
    )
    before = _ok(bench.ask("GET", path))["row"]["live"]
    listed = _ok(bench.ask("GET", f"{path}/versions", "viewer"))
    diff = _ok(bench.ask("GET", f"{path}/diff?before=1&after=2", "viewer"))
    published = _ok(bench.ask("POST", f"{path}/publish", "publisher", {"version": 2}))
    after = _ok(bench.ask("GET", path))["row"]["live"]
    back = _ok(bench.ask("POST", f"{path}/publish", "publisher", {"version": 1}))

    assert (draft["version"], draft["published"]) == (2, False)
    assert (before["version"], before["system_prompt"]) == (1, TEMPLATE.system_prompt)
    assert [(one["version"], one["is_live"], one["message"]) for one in listed["rows"]] == [
        (1, True, ""),
        (2, False, "light"),
    ]
    assert listed["rows"][1]["created_by"] == "key:key editor"
    assert diff["values"]["system_prompt"] == {
        "before": TEMPLATE.system_prompt,
        "after": VERSION["system_prompt"],
    }
    assert "-Describe the picture." in diff["text"]
    assert published["changed"] is True
    assert after["version"] == 2
    assert back["revision"] > published["revision"]


# --- revisions --------------------------------------------------------------------------------


def _edits(bench: Bench) -> list[tuple[str, str, dict[str, Any] | None]]:
    return [
        ("POST", "/api/rules", RULE),
        ("POST", "/api/templates/1/versions", VERSION),
        ("PATCH", "/api/templates/1", {"description": "x"}),
        ("POST", "/api/templates/1/publish", {"version": 1}),
        ("PUT", "/api/templates/1/labels/draft", {"version": 1}),
        ("PATCH", "/api/models/1", {"model_name": "x"}),
        ("DELETE", "/api/providers/2", None),
        ("POST", "/api/characters", {"name": "Ada"}),
    ]


def test_an_edit_of_an_old_revision_is_409_and_changes_nothing(bench: Bench) -> None:
    now = bench.prompts.held().snapshot.revision

    for method, path, body in _edits(bench):
        by_header = bench.ask(method, path, "admin", body, headers={"If-Match": f'"{now - 1}"'})
        assert by_header.status_code == 409, (path, by_header.text)
        assert by_header.json is not None
        assert by_header.json["revision"] == now
        if body is not None:
            by_body = bench.ask(method, path, "admin", {**body, "expected_revision": now - 1})
            assert by_body.status_code == 409, path

    assert bench.prompts.held().snapshot.revision == now


@pytest.mark.parametrize("form", ["{0}", '"{0}"', 'W/"{0}"'])
def test_an_edit_of_the_present_revision_is_done(bench: Bench, form: str) -> None:
    now = bench.prompts.held().snapshot.revision

    answer = bench.ask("POST", "/api/rules", body=RULE, headers={"If-Match": form.format(now)})

    assert _ok(answer, 201)["revision"] > now


def test_header_and_body_that_name_different_revisions_are_400(bench: Bench) -> None:
    now = bench.prompts.held().snapshot.revision

    answer = bench.ask(
        "POST",
        "/api/rules",
        body={**RULE, "expected_revision": now},
        headers={"If-Match": str(now + 1)},
    )

    assert answer.status_code == 400


def test_an_old_live_version_is_409(bench: Bench) -> None:
    _ok(bench.ask("POST", "/api/templates/1/versions", body={**VERSION, "publish": True}), 201)

    for path, body in (
        ("versions", {"system_prompt": "Another.", "expected_version": 1}),
        ("publish", {"version": 1, "expected_version": 1}),
    ):
        answer = bench.ask("POST", f"/api/templates/1/{path}", body=body)
        assert answer.status_code == 409
        assert answer.json is not None
        assert answer.json["version"] == 2


# --- who may do what --------------------------------------------------------------------------


def test_an_editor_makes_what_is_not_live_and_a_publisher_switches_it_on(bench: Bench) -> None:
    live = bench.ask("POST", "/api/rules", "editor", RULE)
    draft = _ok(bench.ask("POST", "/api/rules", "editor", {**RULE, "is_active": False}), 201)
    path = f"/api/rules/{draft['id']}"
    changed = bench.ask("PATCH", path, "editor", {"body": "Mind the dark."})
    switched = bench.ask("PATCH", path, "editor", {"is_active": True})
    published = bench.ask("PATCH", path, "publisher", {"is_active": True})
    late = bench.ask("PATCH", path, "editor", {"body": "Mind me."})
    off = bench.ask("PATCH", path, "editor", {"is_active": False})
    gone = bench.ask("DELETE", path, "editor")

    assert live.status_code == 403
    assert live.json is not None and "publisher" in live.json["error"]
    assert changed.status_code == 200
    assert switched.status_code == 403
    assert published.status_code == 200
    assert [one.status_code for one in (late, off, gone)] == [403, 403, 403]
    assert bench.ask("DELETE", path, "publisher").status_code == 200


def test_an_editor_publishes_no_version(bench: Bench) -> None:
    at_once = bench.ask("POST", "/api/templates/1/versions", "editor", {**VERSION, "publish": True})
    template = bench.ask("PATCH", "/api/templates/1", "editor", {"description": "x"})

    assert at_once.status_code == 403
    assert template.status_code == 403
    assert len(_ok(bench.ask("GET", "/api/templates/1/versions"))["rows"]) == 1


def test_an_editor_labels_versions_and_requests_do_not_change(bench: Bench) -> None:
    _ok(bench.ask("POST", "/api/templates/1/versions", "editor", VERSION), 201)

    _ok(bench.ask("PUT", "/api/templates/1/labels/next", "editor", {"version": 2}))
    labelled = _ok(bench.ask("GET", "/api/templates/1"))["row"]
    _ok(bench.ask("DELETE", "/api/templates/1/labels/next", "editor"))

    assert labelled["labels"] == {"next": 2}
    assert labelled["live"]["version"] == 1
    assert _ok(bench.ask("GET", "/api/templates/1"))["row"]["labels"] == {}
    assert bench.ask("DELETE", "/api/templates/1/labels/next", "editor").status_code == 404
    assert (
        bench.ask("PUT", "/api/templates/1/labels/live", "editor", {"version": 1}).status_code
        == 422
    )


def test_an_administrator_alone_edits_providers(bench: Bench) -> None:
    row = ROWS["providers"][0]

    assert bench.ask("POST", "/api/providers", "publisher", row).status_code == 403
    assert bench.ask("POST", "/api/providers", "admin", row).status_code == 201


@pytest.mark.parametrize(
    "reference",
    ["GATEWAY_JWT_SECRET", "SUPABASE_SERVICE_KEY", "WAN_WORKER_API_KEY", "sk-123", "PATH"],
)
def test_a_provider_is_sent_no_secret_of_ours(bench: Bench, reference: str) -> None:
    row = {**ROWS["providers"][0], "secret_ref": reference}

    assert bench.ask("POST", "/api/providers", "admin", row).status_code == 422
    assert (
        bench.ask("PATCH", "/api/providers/2", "admin", {"secret_ref": reference}).status_code
        == 422
    )


def test_a_task_never_loses_its_default(bench: Bench) -> None:
    for method, path, body in (
        ("DELETE", "/api/assignments/1", None),
        ("PATCH", "/api/assignments/1", {"is_default": False}),
        ("PATCH", "/api/assignments/1", {"is_default": False, "is_active": False}),
        ("PATCH", "/api/models/1", {"is_active": False}),
        ("PATCH", "/api/providers/1", {"is_active": False}),
    ):
        assert bench.ask(method, path, "admin", body).status_code == 409, path


def test_a_new_default_takes_the_place_of_the_one_before(bench: Bench) -> None:
    model = _ok(bench.ask("POST", "/api/models", body=ROWS["models"][0]), 201)
    assert model["id"]
    made = _ok(
        bench.ask(
            "POST",
            "/api/assignments",
            body={
                "model_key": "x/y",
                "display_name": "Y",
                "modality": "chat",
                "task": "enhancement",
                "is_active": False,
            },
        ),
        201,
    )
    path = f"/api/assignments/{made['id']}"

    off = bench.ask("PATCH", path, body={"is_default": True})
    done = bench.ask("PATCH", path, body={"is_default": True, "is_active": True})

    assert off.status_code == 409
    assert done.status_code == 200
    defaults = [
        one["id"] for one in _ok(bench.ask("GET", "/api/assignments"))["rows"] if one["is_default"]
    ]
    assert defaults == [made["id"]]
    assert _ok_llms(bench)["defaultModel"] == "x/y"


def _ok_llms(bench: Bench) -> dict[str, Any]:
    answer = bench.ask("GET", "/api/llms", "user")
    assert answer.status_code == 200
    assert isinstance(answer.json, dict)
    return answer.json


# --- what is refused --------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "body", "status"),
    [
        ("/api/rules", {**RULE, "slot": "footer"}, 422),
        ("/api/rules", {**RULE, "match": {"targetmodel": "sdxl"}}, 422),
        ("/api/rules", {**RULE, "body": "{{ x.__class__ }}"}, 422),
        ("/api/rules", {**RULE, "body": "{% include 'x' %}"}, 422),
        ("/api/rules", {**RULE, "id": 7}, 400),
        ("/api/rules", {"name": "x"}, 400),
        ("/api/rules", {**RULE, "name": ""}, 422),
        ("/api/rules", {**RULE, "priority": 2**40}, 422),
        ("/api/rules", {**RULE, "expected_revision": -1}, 422),
        ("/api/parameters", {"profile": "slow"}, 422),
        ("/api/parameters", {"params": [1]}, 400),
        (
            "/api/negative-prompts",
            {**ROWS["negative-prompts"][0], "negative_prompt": "x" * 2001},
            422,
        ),
        ("/api/providers", {"name": "x", "kind": "openai", "base_url": "http://u:p@x/"}, 422),
        ("/api/models", {**ROWS["models"][0], "provider": "nobody"}, 404),
        ("/api/models", {**ROWS["models"][0], "model_key": "qwen_instruct"}, 409),
        ("/api/assignments", {**ROWS["assignments"][0], "model_key": "nothing"}, 404),
        ("/api/templates", {"template_name": "x"}, 400),
        ("/api/templates/1/versions", {"system_prompt": None}, 422),
        ("/api/templates/1/versions", {"system_prompt": "{{ x() }}"}, 422),
        ("/api/templates/1/versions", {"max_output_tokens": 0}, 422),
        ("/api/templates/1/versions", {"version": 7}, 400),
        ("/api/templates/99/versions", VERSION, 404),
        ("/api/templates/1/publish", {"version": 9}, 404),
        ("/api/templates/1/publish", {"version": 0}, 422),
        ("/api/characters", {"name": "x", "content_rating": "x"}, 422),
        ("/api/characters", {"name": "x", "loras": [{"lora_ref": "a", "weight": 3}]}, 422),
        ("/api/characters", {"name": "x", "loras": [{"lora": "a", "weight": 1}]}, 400),
    ],
    ids=str,
)
def test_an_edit_that_cannot_be_is_refused_and_changes_nothing(
    bench: Bench, path: str, body: dict[str, Any], status: int
) -> None:
    now = bench.prompts.held().snapshot.revision

    answer = bench.ask("POST", path, "admin", body)

    assert answer.status_code == status, answer.text
    assert bench.prompts.held().snapshot.revision == now


def test_ids_beyond_the_columns_are_refused_before_the_database(bench: Bench) -> None:
    for path in ("/api/rules/99999999999999999999", "/api/rules/0", "/api/templates/2147483648"):
        assert bench.ask("GET", path).status_code in (404, 422)
    assert bench.ask("GET", "/api/rules/x").status_code == 404
    assert bench.ask("GET", "/api/rules/-1").status_code == 404


# --- lists ------------------------------------------------------------------------------------


def test_a_list_goes_on_where_its_page_ended(bench: Bench) -> None:
    for number in range(5):
        _ok(bench.ask("POST", "/api/rules", body={**RULE, "name": f"rule {number}"}), 201)

    found: list[str] = []
    cursor: str | None = ""
    while cursor is not None:
        page = _ok(
            bench.ask(
                "GET", f"/api/rules?limit=2&cursor={cursor}" if cursor else "/api/rules?limit=2"
            )
        )
        found += [row["name"] for row in page["rows"]]
        cursor = page["next"]

    assert found == [f"rule {number}" for number in range(5)]


@pytest.mark.parametrize("query", ["limit=0", "limit=201", "limit=x", "cursor=x", "cursor=-1"])
def test_a_page_that_cannot_be_is_refused(bench: Bench, query: str) -> None:
    _ok(bench.ask("POST", "/api/rules", body=RULE), 201)

    assert bench.ask("GET", f"/api/rules?{query}").status_code in (400, 422)


def test_a_list_can_be_of_those_switched_on(bench: Bench) -> None:
    _ok(bench.ask("POST", "/api/rules", body={**RULE, "is_active": False}), 201)

    assert _ok(bench.ask("GET", "/api/rules?is_active=true"))["rows"] == []
    assert len(_ok(bench.ask("GET", "/api/rules?is_active=false"))["rows"]) == 1


# --- characters -------------------------------------------------------------------------------


def test_a_user_edits_own_characters_and_sees_no_one_elses(bench: Bench) -> None:
    shared = _ok(bench.ask("POST", "/api/characters", "admin", {"name": "Everybody's"}), 201)
    lora = {"lora_ref": "ink", "weight": 0.8, "trigger_words": ["ink"]}
    own = _ok(bench.ask("POST", "/api/characters", "user", {"name": "Ada", "loras": [lora]}), 201)
    path = f"/api/characters/{own['id']}"

    row = _ok(bench.ask("GET", path, "user"))["row"]
    mine = _ok(bench.ask("GET", "/api/characters", "user"))["rows"]
    theirs = _ok(bench.ask("GET", "/api/characters", "other user"))["rows"]
    changed = bench.ask("PATCH", path, "user", {"mood": "calm", "loras": []})

    assert (row["owner_id"], row["loras"]) == (USER, [{**lora, "target_model": "*"}])
    assert {one["name"] for one in mine} == {"Everybody's", "Ada"}
    assert {one["name"] for one in theirs} == {"Everybody's"}
    assert changed.status_code == 200
    assert _ok(bench.ask("GET", path, "user"))["row"]["loras"] == []
    for method, body in (("GET", None), ("PATCH", {"mood": "x"}), ("DELETE", None)):
        assert bench.ask(method, path, "other user", body).status_code == 404
    shared_path = f"/api/characters/{shared['id']}"
    assert bench.ask("PATCH", shared_path, "user", {"mood": "x"}).status_code == 404
    assert bench.ask("DELETE", shared_path, "user").status_code == 404
    assert bench.ask("DELETE", path, "user").status_code == 200


def test_a_user_makes_no_character_for_someone_else(bench: Bench) -> None:
    made = bench.ask("POST", "/api/characters", "user", {"name": "x", "owner_id": OTHER})

    assert made.status_code == 403


def test_a_key_of_a_user_sees_what_the_user_sees(bench: Bench) -> None:
    _ok(bench.ask("POST", "/api/characters", "user", {"name": "Ada"}), 201)
    with bench.database.transaction() as connection:
        _, bench.secrets["own"] = create_key(
            connection, name="own", scopes=frozenset({Scope.CALL}), now=NOW, user_id=USER
        )

    rows = _ok(bench.ask("GET", "/api/characters", "own"))["rows"]

    assert [one["name"] for one in rows] == ["Ada"]


# --- dry run ----------------------------------------------------------------------------------


def test_a_dry_run_shows_what_a_draft_would_send_and_changes_nothing(bench: Bench) -> None:
    now = bench.prompts.held().snapshot.revision
    asked = {"prompt": "a red fox", "target_model": "sdxl", "job_type": "image"}
    asked |= {"use_case": "enhancement", "explicit_mode": "sfw"}

    live = _ok(bench.ask("POST", "/api/dry-run", "editor", {"request": asked}))
    draft = _ok(
        bench.ask(
            "POST",
            "/api/dry-run",
            "editor",
            {"template_id": 1, "draft": VERSION, "request": {"prompt": "a red fox"}},
        )
    )

    assert live["messages"] == [
        {"role": "system", "content": TEMPLATE.system_prompt},
        {"role": "user", "content": "a red fox"},
    ]
    assert live["used_draft"] is False
    assert draft["messages"][0]["content"] == VERSION["system_prompt"]
    assert draft["used_draft"] is True
    assert draft["messages_sha256"] != live["messages_sha256"]
    assert draft["trace"]
    assert bench.prompts.held().snapshot.revision == now


def test_a_dry_run_tries_an_older_version_and_a_template_that_is_off(bench: Bench) -> None:
    _ok(bench.ask("POST", "/api/templates/1/versions", body={**VERSION, "publish": True}), 201)
    _ok(bench.ask("PATCH", "/api/templates/1", body={"is_active": False}))
    body = {"template_id": 1, "version": 1, "request": {"prompt": "a red fox"}}

    answer = _ok(bench.ask("POST", "/api/dry-run", "editor", body))

    assert answer["messages"][0]["content"] == TEMPLATE.system_prompt
    assert answer["used_draft"] is True


@pytest.mark.parametrize(
    ("body", "status"),
    [
        ({"request": {"prompt": "x"}}, 422),
        ({"request": {"prompt": "x"}, "draft": VERSION}, 422),
        ({"request": {"prompt": "x"}, "template_id": 99}, 404),
        ({"request": {"prompt": "x"}, "template_id": 1, "version": 9}, 404),
        ({"request": {"prompt": "x"}, "template_id": 1, "draft": {"system_prompt": None}}, 422),
        (
            {"request": {"prompt": "x"}, "template_id": 1, "draft": {"system_prompt": "{{ a.b }}"}},
            422,
        ),
        ({"request": {"prompt": "x" * 20_001}, "template_id": 1}, 422),
        ({"request": {"prompt": "x", "target_model": "t", "job_type": "j", "use_case": "u"}}, 404),
        ({}, 400),
    ],
    ids=lambda one: str(one)[:60],
)
def test_a_dry_run_that_cannot_be_says_why(bench: Bench, body: dict[str, Any], status: int) -> None:
    answer = bench.ask("POST", "/api/dry-run", "editor", body)

    assert answer.status_code == status, answer.text


# --- the audit log ----------------------------------------------------------------------------


def test_every_edit_is_in_the_audit_log_with_its_maker(bench: Bench) -> None:
    made = _ok(bench.ask("POST", "/api/rules", "admin user", RULE), 201)

    subject = f"prompt_rules/{made['id']}"
    rows = _ok(bench.ask("GET", f"/api/audit?subject={subject}"))["rows"]

    assert [(one["action"], one["actor"][:5]) for one in rows] == [("create", "user:")]
    assert rows[0]["revision"] <= made["revision"]
