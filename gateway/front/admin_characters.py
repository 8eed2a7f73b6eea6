"""Characters over HTTP. Whoever edits prompts edits everybody's; a user edits own ones, and sees
those and everybody's. Private ones of someone else are for administrators only."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Any

from flask.typing import ResponseReturnValue
from flask_openapi3.blueprint import APIBlueprint
from flask_openapi3.models.tag import Tag
from pydantic import BaseModel, Field

from gateway.access.caller import Caller, Scope, owner
from gateway.errors import Forbidden, NotFound
from gateway.front import revision
from gateway.front.access import caller, needs
from gateway.front.admin_bodies import (
    EditBody,
    LoraBody,
    PageQuery,
    create_body,
    given,
    patch_body,
)
from gateway.front.admin_edit import allow_live, answer, editing, holds, page
from gateway.front.services import Services
from gateway.store import character_edits
from gateway.store.editing import Editor
from gateway.store.tables import characters
from gateway.values.rows import NSFW, Character, Snapshot
from gateway.values.seeds import SeedCharacter

CharacterFields = create_body(
    "CharacterFields",
    SeedCharacter,
    id=(str | None, Field(None, max_length=36, description="Drawn where it is left out")),
    loras=(list[LoraBody], Field(default_factory=list, max_length=character_edits.MAX_LORAS)),
)
CharacterChange = patch_body("CharacterChange", CharacterFields, without=("id",))


class CharacterCreate(CharacterFields):  # type: ignore[valid-type,misc]
    owner_id: str | None = Field(
        None, max_length=36, description="Whose; left out: the user who asks, else everybody's"
    )


class CharacterPath(BaseModel):
    id: str = Field(min_length=1, max_length=36)


def blueprint(services: Services) -> APIBlueprint:
    api = APIBlueprint(
        "admin_characters",
        __name__,
        url_prefix="/api/characters",
        abp_tags=[Tag(name="characters")],
    )

    @api.get("", summary="The characters that the caller may use, by id")
    @needs(Scope.CALL, Scope.VIEWER)
    def listed(query: PageQuery) -> ResponseReturnValue:
        held = revision.held(services.prompts)
        found = page(_visible(held.snapshot, caller()), query, _id, asdict)
        return {**found, "revision": held.snapshot.revision}

    @api.get("/<id>", summary="One of them")
    @needs(Scope.CALL, Scope.VIEWER)
    def one(path: CharacterPath) -> ResponseReturnValue:
        held = revision.held(services.prompts)
        for row in _visible(held.snapshot, caller()):
            if row.id == path.id:
                return {"success": True, "row": asdict(row), "revision": held.snapshot.revision}
        raise NotFound("there is no such character")

    @api.post("", summary="Make a character")
    @needs(Scope.CALL, Scope.EDITOR)
    def create(body: CharacterCreate) -> ResponseReturnValue:
        who = caller()
        as_user = _as_user(who)
        owner_id = body.owner_id or as_user
        _allow_rating(who, body.content_rating)
        if as_user is None:
            allow_live(body.is_active)
            if not _may_reach(who, owner_id):
                raise Forbidden("characters of another user are made with the scope admin")
        value = SeedCharacter(
            **{
                **{name: getattr(body, name) for name in _PLAIN},
                "id": body.id or str(uuid.uuid4()),
                "loras": tuple(lora.value() for lora in body.loras),
            }
        )
        with editing(services, body) as editor:
            key = character_edits.create_character(
                editor, value, owner_id=owner_id, as_user=as_user
            )
        return answer(editor, id=key, changed=True), 201

    @api.patch("/<id>", summary="Change one of them")
    @needs(Scope.CALL, Scope.EDITOR)
    def change(path: CharacterPath, body: CharacterChange) -> ResponseReturnValue:  # type: ignore[valid-type]
        who = caller()
        as_user = _as_user(who)
        values = _values(body)
        _allow_rating(who, values.get("content_rating"))
        with editing(services, body) as editor:
            if as_user is None:
                before = _found(editor, who, path.id)
                allow_live(before["is_active"], values.get("is_active"))
            changed = character_edits.change_character(editor, path.id, values, as_user=as_user)
        return answer(editor, id=path.id, changed=changed)

    @api.delete("/<id>", summary="Delete one of them")
    @needs(Scope.CALL, Scope.EDITOR)
    def remove(path: CharacterPath) -> ResponseReturnValue:
        who = caller()
        as_user = _as_user(who)
        with editing(services) as editor:
            if as_user is None:
                allow_live(_found(editor, who, path.id)["is_active"])
            character_edits.remove_character(editor, path.id, as_user=as_user)
        return answer(editor, id=path.id, changed=True)

    return api


_PLAIN = tuple(
    name
    for name in CharacterFields.model_fields
    if name not in EditBody.model_fields and name not in ("id", "loras")
)


def _as_user(who: Caller) -> str | None:
    """The user that an edit is limited to; None: the caller edits all. Raises Forbidden for a
    program that is neither."""
    return None if holds(who, Scope.EDITOR) else owner(who)


def _visible(snapshot: Snapshot, who: Caller) -> list[Character]:
    """Of everybody's, readers of the configuration see also what is switched off. nsfw ones are
    for those who may use nsfw, and for these readers."""
    is_reader = holds(who, Scope.VIEWER)
    return [
        one
        for one in snapshot.characters
        if _may_reach(who, one.owner_id)
        and (one.is_active or is_reader or one.owner_id is not None)
        and (one.content_rating != NSFW or is_reader or who.may_use_nsfw)
    ]


def _may_reach(who: Caller, owner_id: str | None) -> bool:
    """Whether the owner's characters are there for the caller: everybody's, own ones, and all for
    an administrator."""
    return owner_id is None or owner_id == who.user_id or holds(who, Scope.ADMIN)


def _found(editor: Editor, who: Caller, character_id: str) -> dict[str, Any]:
    row = editor.find(characters, character_id)
    if not _may_reach(who, row["owner_id"]):
        raise NotFound("there is no such character")
    return row


def _allow_rating(who: Caller, rating: str | None) -> None:
    """Raises Forbidden where the caller would not see what it makes."""
    if rating == NSFW and not (who.may_use_nsfw or holds(who, Scope.VIEWER)):
        raise Forbidden("this user may not use nsfw: rate the character sfw")


def _values(body: EditBody) -> dict[str, Any]:
    values = given(body)
    if values.get("loras") is not None:
        values["loras"] = tuple(lora.value() for lora in values["loras"])
    elif "loras" in values:
        values["loras"] = ()
    return values


def _id(row: Character) -> str:
    return row.id
