"""Edits through the store: checks, versions, defaults, owners, conflicts and their audit trail."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

import pytest
from sqlalchemy import select

from gateway.errors import Conflict, Forbidden, Invalid, NotFound, TemplateFault, TooLarge
from gateway.store.audit import append_audit, verify_audit
from gateway.store.character_edits import (
    MAX_OWNED,
    change_character,
    create_character,
    remove_character,
)
from gateway.store.database import Database
from gateway.store.editing import edit
from gateway.store.loading import load_snapshot, read_revision
from gateway.store.model_edits import (
    change_assignment,
    change_model,
    change_provider,
    remove_assignment,
    set_default,
)
from gateway.store.rule_edits import change_rule, create_negative, create_rule, remove_rule
from gateway.store.tables import audit_log, template_labels
from gateway.store.template_edits import (
    change_template,
    create_template,
    new_version,
    publish,
    remove_label,
    set_label,
)
from gateway.store.versions import diff_versions, stored_versions
from gateway.values.rows import CharacterLora, Snapshot
from gateway.values.seeds import SeedCharacter, SeedNegative, SeedRule
from tests.gateway.store_rows import plain, template

AT = datetime(2026, 3, 1, 12, 0, 0, 123456, tzinfo=UTC)


def _snapshot(database: Database) -> Snapshot:
    with database.reading() as connection:
        return load_snapshot(connection)


def _template_id(database: Database) -> int:
    return next(
        one.id
        for one in _snapshot(database).templates
        if one.template_name == "enhancement_sdxl_sfw"
    )


def test_a_new_version_is_live_and_says_who_made_it_and_why(filled: Database) -> None:
    template_id = _template_id(filled)

    with edit(filled, actor="anna", at=AT) as editor:
        made = new_version(editor, template_id, {"system_prompt": "Line one.\nTwo."}, "shorter")

    live = _snapshot(filled).template("sdxl", "image", "enhancement", "sfw")
    assert live is not None and live.live.id == made.version_id
    assert (made.version, made.created) == (2, True)
    with filled.reading() as connection:
        last = stored_versions(connection, template_id)[-1]
        difference = diff_versions(connection, template_id, 1, 2)
    assert (last.message, last.created_by, last.created_at) == ("shorter", "anna", AT)
    assert list(difference.values) == ["system_prompt"]
    assert "-Describe the picture." in difference.text
    assert "+Line one." in difference.text


def test_the_same_text_is_one_version_and_the_pointer_moves_back_and_forth(
    filled: Database,
) -> None:
    template_id = _template_id(filled)

    with edit(filled, actor="anna") as editor:
        new_version(editor, template_id, {"system_prompt": "Two."})
        again = new_version(editor, template_id, {"system_prompt": "Describe the picture."})
        moved = publish(editor, template_id, 2)
        stays = publish(editor, template_id, 2)

    assert (again.version, again.created) == (1, False)
    assert (moved, stays) == (True, False)
    assert [one.live.version for one in _snapshot(filled).templates if one.id == template_id] == [2]


def test_a_draft_is_stored_and_not_live(filled: Database) -> None:
    template_id = _template_id(filled)

    with edit(filled, actor="anna") as editor:
        made = new_version(editor, template_id, {"params": {"temperature": 1}}, publish=False)

    assert made.version == 2
    assert [one.live.version for one in _snapshot(filled).templates if one.id == template_id] == [1]


def test_labels_point_into_their_own_template(filled: Database) -> None:
    template_id = _template_id(filled)

    with edit(filled, actor="anna") as editor:
        new_version(editor, template_id, {"system_prompt": "Two."})
        set_label(editor, template_id, "stable", 1)
        set_label(editor, template_id, "stable", 2)
        set_label(editor, template_id, "old", 1)
        remove_label(editor, template_id, "old")

    with filled.reading() as connection:
        labels = connection.execute(select(template_labels.c.label)).scalars().all()
    assert labels == ["stable"]
    with pytest.raises(NotFound, match="no version 9"), edit(filled, actor="a") as editor:
        set_label(editor, template_id, "stable", 9)


def test_a_template_can_be_made_switched_off_and_made_again_for_its_tuple(
    filled: Database,
) -> None:
    template_id = _template_id(filled)
    with pytest.raises(Conflict, match="active"), edit(filled, actor="a") as editor:
        create_template(editor, template("new"))

    with edit(filled, actor="a") as editor:
        change_template(editor, template_id, {"is_active": False})
        made = create_template(editor, template("new"), "instead")

    live = _snapshot(filled).template("sdxl", "image", "enhancement", "sfw")
    assert live is not None and live.id == made


def test_an_edit_of_an_older_revision_is_a_conflict(filled: Database) -> None:
    with filled.reading() as connection:
        revision = read_revision(connection)
    with edit(filled, actor="a", expected_revision=revision) as editor:
        change_rule(editor, 1, {"priority": 5})

    with (
        pytest.raises(Conflict) as caught,
        edit(filled, actor="b", expected_revision=revision),
    ):
        pass

    assert caught.value.fields == {"revision": editor.revision}
    assert editor.revision > revision


def test_an_edit_of_an_older_version_is_a_conflict(filled: Database) -> None:
    template_id = _template_id(filled)
    with edit(filled, actor="a") as editor:
        new_version(editor, template_id, {"system_prompt": "Two."}, expected_version=1)

    with pytest.raises(Conflict, match="version 2"), edit(filled, actor="b") as editor:
        new_version(editor, template_id, {"system_prompt": "Three."}, expected_version=1)


def test_an_edit_that_fails_leaves_nothing_of_itself(filled: Database) -> None:
    before = _snapshot(filled)

    with pytest.raises(Invalid), edit(filled, actor="a") as editor:
        remove_rule(editor, 1)
        create_rule(editor, SeedRule(name="x", rule_type="middle", slot="user", body=""))

    assert _snapshot(filled) == before


def test_rules_have_their_tags_and_go_with_them(filled: Database) -> None:
    with edit(filled, actor="a") as editor:
        rule_id = create_rule(
            editor,
            SeedRule(name="n", rule_type="append", slot="user", body="b", tags=("b", "a", "b")),
        )
        assert change_rule(editor, rule_id, {"tags": ["c", "a"], "priority": 3})
        assert not change_rule(editor, rule_id, {"tags": ["a", "c"], "priority": 3})

    rule = next(one for one in _snapshot(filled).rules if one.id == rule_id)
    assert (rule.tags, rule.priority) == (("a", "c"), 3)
    with edit(filled, actor="a") as editor:
        remove_rule(editor, rule_id)
    assert all(one.id != rule_id for one in _snapshot(filled).rules)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"body": "zero \0"}, "zero character"),
        ({"body": "half \ud800"}, "surrogate"),
        ({"match": {"target": "sdxl"}}, "unknown keys: target"),
        ({"match": {"quality": 3}}, "match.quality"),
        ({"match": {"quality": "\0"}}, "zero character"),
        ({"match": ["sdxl"]}, "match is an object"),
        ({"priority": 2**31}, "whole number"),
        ({"priority": True}, "whole number"),
        ({"max_tokens": 0}, "1 to"),
        ({"is_active": 1}, "true or false"),
        ({"name": " x"}, "spaces"),
        ({"name": "x" * 121}, "121 characters, 120 at most"),
        ({"slot": None}, "slot is missing"),
        ({"id": 7}, "cannot be set"),
        ({"colour": "red"}, "no columns colour"),
    ],
)
def test_a_value_that_does_not_fit_is_refused_with_its_range(
    filled: Database, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Invalid, match=reason), edit(filled, actor="a") as editor:
        change_rule(editor, 1, values)


@pytest.mark.parametrize(
    ("values", "reason"),
    [
        ({"secret_ref": "sk-or-v1-0123456789"}, "not the secret"),
        ({"base_url": "https://user:word@host/"}, "without a user"),
        ({"base_url": "file:///etc/passwd"}, "http"),
    ],
)
def test_a_provider_never_holds_a_secret(
    filled: Database, values: dict[str, Any], reason: str
) -> None:
    with pytest.raises(Invalid, match=reason) as caught, edit(filled, actor="a") as editor:
        change_provider(editor, 1, values)

    assert str(next(iter(values.values()))) not in str(caught.value)


def test_the_check_of_texts_sees_each_text_and_can_refuse(filled: Database) -> None:
    seen: list[tuple[str, tuple[str, ...]]] = []

    def check(text: str, variables: tuple[str, ...]) -> None:
        seen.append((text, variables))
        if "{%" in text:
            raise TemplateFault("no statements")

    template_id = _template_id(filled)
    with edit(filled, actor="a", check_text=check) as editor:
        new_version(editor, template_id, {"system_prompt": "{{mood}}"})

    assert ("{{mood}}", ("mood",)) in seen
    with (
        pytest.raises(TemplateFault),
        edit(filled, actor="a", check_text=check) as editor,
    ):
        change_rule(editor, 1, {"body": "{% for %}"})


# --- models -----------------------------------------------------------------------------------


def _assignments(database: Database, task: str = "enhancement") -> dict[str, Any]:
    return {one.model_key: one for one in _snapshot(database).assignments if one.task == task}


def test_set_default_moves_the_default(filled: Database) -> None:
    other = _assignments(filled)["gryphe/mythomax-l2-13b"]

    with edit(filled, actor="a") as editor:
        assert set_default(editor, other.id)
        assert not set_default(editor, other.id)

    assert {key: one.is_default for key, one in _assignments(filled).items()} == {
        "gryphe/mythomax-l2-13b": True,
        "qwen_instruct": False,
    }


@pytest.mark.parametrize("what", ["off", "no default", "removed", "model off", "provider off"])
def test_a_task_is_never_left_without_an_active_default(filled: Database, what: str) -> None:
    default = _assignments(filled)["qwen_instruct"]

    with pytest.raises(Conflict, match="chat/enhancement"), edit(filled, actor="a") as editor:
        if what == "off":
            change_assignment(editor, default.id, {"is_active": False, "is_default": False})
        elif what == "no default":
            change_assignment(editor, default.id, {"is_default": False})
        elif what == "removed":
            remove_assignment(editor, default.id)
        elif what == "model off":
            change_model(editor, default.llm_model_id, {"is_active": False})
        else:
            change_provider(editor, 1, {"is_active": False})

    assert _assignments(filled)["qwen_instruct"].is_default


def test_what_is_switched_off_does_not_become_the_default(filled: Database) -> None:
    other = _assignments(filled)["gryphe/mythomax-l2-13b"]

    with pytest.raises(Conflict, match="provider"), edit(filled, actor="a") as editor:
        change_provider(editor, 2, {"is_active": False})
        set_default(editor, other.id)


# --- characters -------------------------------------------------------------------------------


def test_a_user_edits_own_characters_only(filled: Database) -> None:
    mine = SeedCharacter(id="mine", name="Mine", loras=(CharacterLora(lora_ref="a", weight=1),))
    with edit(filled, actor="u1") as editor:
        create_character(editor, mine, owner_id="u1", as_user="u1")
        change_character(
            editor,
            "mine",
            {"mood": "calm", "loras": (CharacterLora(lora_ref="b", weight=-2.0),)},
            as_user="u1",
        )

    character = _snapshot(filled).character("mine")
    assert character is not None
    assert (character.mood, [one.lora_ref for one in character.loras]) == ("calm", ["b"])
    for other in ("mine", "demo-1", "none"):
        with pytest.raises(NotFound), edit(filled, actor="u2") as editor:
            change_character(editor, other, {"mood": "x"}, as_user="u2")
        with pytest.raises(NotFound), edit(filled, actor="u2") as editor:
            remove_character(editor, other, as_user="u2")
    with pytest.raises(Forbidden), edit(filled, actor="u2") as editor:
        create_character(editor, replace(mine, id="x"), owner_id="u1", as_user="u2")
    with pytest.raises(Forbidden), edit(filled, actor="u1") as editor:
        change_character(editor, "mine", {"owner_id": None}, as_user="u1")


def test_a_user_has_so_many_characters_and_everybody_more(filled: Database) -> None:
    def one(number: int) -> SeedCharacter:
        return SeedCharacter(id=f"c{number}", name="N")

    with edit(filled, actor="u1") as editor:
        for number in range(MAX_OWNED):
            create_character(editor, one(number), owner_id="u1", as_user="u1")

    with pytest.raises(TooLarge, match="50 characters, and 50"), edit(filled, actor="u1") as editor:
        create_character(editor, one(MAX_OWNED), owner_id="u1", as_user="u1")
    with pytest.raises(TooLarge, match="50 characters"), edit(filled, actor="admin") as editor:
        change_character(editor, "demo-1", {"owner_id": "u1"}, as_user=None)
    with edit(filled, actor="u1") as editor:
        change_character(editor, "c0", {"mood": "calm"}, as_user="u1")
        remove_character(editor, "c0", as_user="u1")
        create_character(editor, one(MAX_OWNED), owner_id="u1", as_user="u1")
        create_character(editor, one(MAX_OWNED + 1), owner_id="u2", as_user="u2")
        create_character(editor, one(MAX_OWNED + 2), owner_id=None)
    assert len(_snapshot(filled).characters) == MAX_OWNED + 3


@pytest.mark.parametrize(
    ("most", "over", "numbers"),
    [
        ({"persona": "é" * 8000}, {"persona": "é" * 8001}, "8001 characters; 8000"),
        ({"system_prompt": "x" * 8000}, {"system_prompt": "x" * 8001}, "8001 characters; 8000"),
        ({"card": {"a": "x" * 32760}}, {"card": {"a": "x" * 32761}}, "32769 bytes as JSON; 32768"),
        ({"card": {"a": "é" * 16380}}, {"card": {"a": "é" * 16381}}, "32770 bytes as JSON; 32768"),
        ({"defaults": {"a": "x" * 4088}}, {"defaults": {"a": "x" * 4089}}, "4097 bytes"),
        ({"tags": ["x" * 4092]}, {"tags": ["x" * 4093]}, "4097 bytes"),
        (
            {"loras": (CharacterLora(lora_ref="a", weight=1, trigger_words=("x" * 2044,)),)},
            {"loras": (CharacterLora(lora_ref="a", weight=1, trigger_words=("x" * 2045,)),)},
            "2049 bytes",
        ),
        (
            {"loras": tuple(CharacterLora(lora_ref=str(n), weight=1) for n in range(16))},
            {"loras": tuple(CharacterLora(lora_ref=str(n), weight=1) for n in range(17))},
            "17 adapters; 16",
        ),
    ],
)
def test_a_text_of_an_owned_character_has_a_limit_when_made_and_when_changed(
    filled: Database, most: dict[str, Any], over: dict[str, Any], numbers: str
) -> None:
    with edit(filled, actor="u1") as editor:
        create_character(editor, SeedCharacter(id="a", name="N", **most), owner_id="u1")
        create_character(editor, SeedCharacter(id="b", name="N"), owner_id="u1")
        assert change_character(editor, "b", most, as_user="u1")
        create_character(editor, SeedCharacter(id="shared", name="N", **over), owner_id=None)

    with pytest.raises(TooLarge, match=numbers), edit(filled, actor="u1") as editor:
        create_character(editor, SeedCharacter(id="c", name="N", **over), owner_id="u1")
    with pytest.raises(TooLarge, match=numbers), edit(filled, actor="u1") as editor:
        change_character(editor, "b", over, as_user="u1")
    with pytest.raises(TooLarge, match=numbers), edit(filled, actor="admin") as editor:
        change_character(editor, "shared", {"owner_id": "u1"}, as_user=None)
    assert {one.id for one in _snapshot(filled).characters} == {"a", "b", "shared", "demo-1"}


def test_an_error_of_a_unique_value_does_not_show_the_value(filled: Database) -> None:
    twice = SeedNegative(target_model="sdxl", content_mode="sfw", negative_prompt="blurry")

    with pytest.raises(Conflict) as caught, edit(filled, actor="a") as editor:
        create_negative(editor, twice)

    assert "blurry" not in str(caught.value)


# --- audit ------------------------------------------------------------------------------------


def test_each_edit_is_in_the_audit_log_and_the_chain_holds(filled: Database) -> None:
    with edit(filled, actor="anna", at=AT) as editor:
        change_rule(editor, 1, {"priority": 5, "match": {"quality": "high"}})

    with filled.reading() as connection:
        state = verify_audit(connection)
        last = connection.execute(select(audit_log).order_by(audit_log.c.id.desc())).first()
    assert last is not None
    assert (state.broken_id, state.head, state.rows) == (None, last.hash, 2)
    assert (last.actor, last.action, last.subject, last.at) == (
        "anna",
        "change",
        "prompt_rules/1",
        AT,
    )
    assert last.detail == {
        "before": {"priority": 0, "match": {}},
        "after": {"priority": 5, "match": {"quality": "high"}},
    }
    assert last.revision == editor.revision


def _details(database: Database) -> list[Any]:
    with database.reading() as connection:
        found = connection.execute(select(audit_log.c.detail).order_by(audit_log.c.id))
        return list(found.scalars())


def test_the_audit_log_has_lengths_of_an_owned_characters_texts(filled: Database) -> None:
    lora = CharacterLora(lora_ref="SECRET", weight=1, trigger_words=("SECRET",))
    mine = SeedCharacter(
        id="mine",
        name="SECRET",
        persona="SECRET, née.",
        system_prompt="SECRET",
        voice_tone="SECRET",
        mood="SECRET",
        tags=("SECRET",),
        defaults={"SECRET": 1},
        card={"SECRET": "SECRET"},
        loras=(lora,),
    )

    with edit(filled, actor="u1") as editor:
        create_character(editor, mine, owner_id="u1", as_user="u1")
        changed = {"persona": "SECRET!", "loras": (replace(lora, trigger_words=("SECRET", "b")),)}
        change_character(editor, "mine", {**changed, "is_active": False}, as_user="u1")
        change_character(editor, "mine", {"loras": ()}, as_user="u1")
        remove_character(editor, "mine", as_user="u1")

    made, with_lora, edited, lora_edited, lora_gone, gone = _details(filled)[1:]
    assert "SECRET" not in str([made, with_lora, edited, lora_edited, lora_gone, gone])
    assert made["after"]["persona"] == {"length": 12}
    assert made["after"]["card"] == {"length": len('{"SECRET":"SECRET"}')}
    assert (made["after"]["id"], made["after"]["owner_id"]) == ("mine", "u1")
    assert with_lora["after"]["character_id"] == "mine"
    assert edited == {
        "before": {"persona": {"length": 12}, "is_active": True},
        "after": {"persona": {"length": 7}, "is_active": False},
    }
    assert lora_edited["after"] == {"trigger_words": {"length": len('["SECRET","b"]')}}
    assert lora_gone["before"]["weight"] == 1
    assert gone["before"]["content_rating"] == "sfw"
    with filled.reading() as connection:
        assert verify_audit(connection).broken_id is None


def test_the_audit_log_has_no_text_of_a_character_that_gets_or_loses_its_owner(
    filled: Database,
) -> None:
    with edit(filled, actor="admin") as editor:
        given = {"owner_id": "u1", "persona": "SECRET", "loras": ()}
        change_character(editor, "demo-1", given, as_user=None)
        taken = {"owner_id": None, "persona": "Everybody's."}
        change_character(editor, "demo-1", taken, as_user=None)
        change_character(editor, "demo-1", {"persona": "Still."}, as_user=None)

    details = _details(filled)[1:]
    assert "SECRET" not in str(details)
    assert details[-1] == {"before": {"persona": "Everybody's."}, "after": {"persona": "Still."}}


@pytest.mark.parametrize("damage", ["changed", "taken away", "put in"])
def test_a_damaged_chain_is_found_at_its_first_broken_row(
    filled: Database, engine_name: str, damage: str
) -> None:
    for number in range(3):
        with edit(filled, actor="a") as editor:
            change_rule(editor, 1, {"priority": 10 + number})
    statement = {
        "changed": "UPDATE audit_log SET actor = 'b' WHERE id = 3",
        "taken away": "DELETE FROM audit_log WHERE id = 2",
        "put in": "UPDATE audit_log SET previous_hash = 'x' WHERE id = 3",
    }[damage]

    with plain(filled) as connection:
        if engine_name == "sqlite":
            for name in ("never_changes", "never_goes"):
                connection.execute(f"DROP TRIGGER audit_log_{name}")
        else:
            connection.execute("ALTER TABLE audit_log DISABLE TRIGGER USER")
        connection.execute(statement)

    with filled.reading() as connection:
        state = verify_audit(connection)
    assert state.broken_id == 3
    assert state.rows == (1 if damage == "taken away" else 2)


def test_others_can_write_to_the_audit_log_too(database: Database) -> None:
    with database.transaction() as connection:
        append_audit(
            connection, at=AT, actor="a", action="key", subject="api_keys/1", detail={"x": 1.5}
        )

    with database.reading() as connection:
        assert verify_audit(connection).rows == 1
