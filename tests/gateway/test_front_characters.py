"""Characters over HTTP: who sees which of them, how many and how long, and that texts are data."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from gateway.access.caller import Scope
from gateway.access.keys import create_key
from gateway.prompts.assemble import assemble
from gateway.store.character_edits import MAX_OWNED, create_character
from gateway.store.database import Database
from gateway.store.editing import edit
from gateway.store.template_edits import create_template
from gateway.values.assembly import AssembleRequest
from gateway.values.seeds import SeedCharacter, SeedTemplate
from tests.gateway.conftest import MakeDatabase
from tests.gateway.front_parts import NOW, OTHER, USER, Bench

PATH = "/api/characters"
# id: (owner, rating, is active)
CHARACTERS: dict[str, tuple[str | None, str, bool]] = {
    "shared": (None, "sfw", True),
    "shared off": (None, "sfw", False),
    "shared nsfw": (None, "nsfw", True),
    "mine": (USER, "sfw", True),
    "mine off": (USER, "sfw", False),
    "mine nsfw": (USER, "nsfw", True),
    "theirs": (OTHER, "sfw", True),
    "theirs nsfw": (OTHER, "nsfw", True),
}
SHARED = {"shared", "shared off", "shared nsfw"}


@pytest.fixture
def bench(make_database: MakeDatabase, tmp_path: Path) -> Bench:
    made = Bench(make_database("sqlite"), tmp_path)
    made.edit_all()
    return made


@pytest.fixture
def peopled(bench: Bench) -> Bench:
    """With CHARACTERS, and a key of the user with the scope viewer."""
    with edit(bench.database, actor="test", at=NOW) as editor:
        for key, (owner_id, rating, is_active) in CHARACTERS.items():
            value = SeedCharacter(id=key, name="N", content_rating=rating, is_active=is_active)
            create_character(editor, value, owner_id=owner_id)
    with bench.database.transaction() as connection:
        _, bench.secrets["reading user"] = create_key(
            connection, name="r", scopes=frozenset({Scope.VIEWER}), now=NOW, user_id=USER
        )
    return bench


def _ok(answer: Any, status: int = 200) -> dict[str, Any]:
    assert answer.status_code == status, answer.text
    assert isinstance(answer.json, dict)
    return answer.json


@pytest.mark.parametrize(
    ("who", "may_use_nsfw", "seen"),
    [
        ("user", False, {"shared", "mine", "mine off"}),
        ("user", True, {"shared", "shared nsfw", "mine", "mine off", "mine nsfw"}),
        ("other user", False, {"shared", "theirs"}),
        ("call", False, {"shared", "shared nsfw"}),
        ("service", False, {"shared", "shared nsfw"}),
        ("viewer", False, SHARED),
        ("editor", False, SHARED),
        ("publisher", False, SHARED),
        ("reading user", False, SHARED | {"mine", "mine off", "mine nsfw"}),
        ("admin", False, set(CHARACTERS)),
        ("admin user", False, set(CHARACTERS)),
    ],
)
def test_a_caller_sees_the_characters_that_its_owner_and_rights_allow(
    peopled: Bench, who: str, may_use_nsfw: bool, seen: set[str]
) -> None:
    _ok(peopled.ask("PATCH", f"/api/users/{USER}", "admin", {"may_use_nsfw": may_use_nsfw}))

    listed = {one["id"] for one in _ok(peopled.ask("GET", PATH, who))["rows"]}
    answers = {key: peopled.ask("GET", f"{PATH}/{key}", who).status_code for key in CHARACTERS}

    assert listed == seen
    assert answers == {key: 200 if key in seen else 404 for key in CHARACTERS}


def test_a_private_character_of_someone_else_is_edited_by_an_administrator_only(
    peopled: Bench,
) -> None:
    path = f"{PATH}/theirs"

    for who in ("editor", "publisher"):
        assert peopled.ask("PATCH", path, who, {"mood": "x"}).status_code == 404
        assert peopled.ask("DELETE", path, who).status_code == 404
        made = peopled.ask("POST", PATH, who, {"name": "x", "owner_id": OTHER, "is_active": False})
        assert made.status_code == 403
    _ok(peopled.ask("PATCH", path, "admin", {"mood": "x"}))
    _ok(peopled.ask("DELETE", path, "admin"))
    _ok(peopled.ask("POST", PATH, "admin", {"name": "x", "owner_id": OTHER}), 201)
    _ok(peopled.ask("PATCH", f"{PATH}/shared", "publisher", {"mood": "x"}))


def test_a_user_who_may_not_use_nsfw_rates_no_character_so_and_can_delete_an_old_one(
    peopled: Bench,
) -> None:
    nsfw = {"content_rating": "nsfw"}

    made = peopled.ask("POST", PATH, "user", {"name": "x", **nsfw})
    changed = peopled.ask("PATCH", f"{PATH}/mine", "user", nsfw)

    assert (made.status_code, changed.status_code) == (403, 403)
    _ok(peopled.ask("DELETE", f"{PATH}/mine nsfw", "user"))
    _ok(peopled.ask("PATCH", f"/api/users/{USER}", "admin", {"may_use_nsfw": True}))
    _ok(peopled.ask("POST", PATH, "user", {"name": "x", **nsfw}), 201)
    _ok(peopled.ask("PATCH", f"{PATH}/mine", "user", nsfw))


def test_what_is_too_much_is_413_with_both_numbers(bench: Bench) -> None:
    long = bench.ask("POST", PATH, "user", {"name": "x", "persona": "x" * 8001})
    for _ in range(MAX_OWNED):
        _ok(bench.ask("POST", PATH, "user", {"name": "x"}), 201)
    many = bench.ask("POST", PATH, "user", {"name": "x"})

    assert (long.status_code, many.status_code) == (413, 413)
    assert "8001 characters; 8000" in long.text
    assert f"{MAX_OWNED} characters" in many.text
    assert len(_ok(bench.ask("GET", PATH, "user"))["rows"]) == MAX_OWNED


def test_braces_in_a_characters_texts_reach_the_prompt_as_they_are(
    database: Database, tmp_path: Path
) -> None:
    bench = Bench(database, tmp_path)
    bench.edit_all()
    persona, own = "Greets {{ user.name }} and {% if", "Says {{ and {# and %}."
    with edit(bench.database, actor="test", at=NOW) as editor:
        create_template(
            editor,
            SeedTemplate(
                template_name="chat_sfw",
                target_model="qwen_instruct",
                job_type="chat",
                use_case="chat",
                content_mode="sfw",
                system_prompt="You are {{character_persona}}!",
                max_output_tokens=100,
            ),
        )

    made = _ok(bench.ask("POST", PATH, "user", {"name": "Ada", "persona": "x"}), 201)
    texts = {"persona": persona, "system_prompt": own}
    _ok(bench.ask("PATCH", f"{PATH}/{made['id']}", "user", texts))
    other = _ok(bench.ask("POST", PATH, "user", {"name": "Ada", **texts}), 201)

    for key in (made["id"], other["id"]):
        request = AssembleRequest(
            prompt="Hello.",
            target_model="qwen_instruct",
            job_type="chat",
            use_case="chat",
            explicit_mode="sfw",
            character_id=key,
            user_id=USER,
        )
        assembled = assemble(bench.prompts.held().snapshot, request, bench.services.counters)
        system = assembled.messages[0].content
        assert f"You are {persona}!" in system
        assert own in system
