"""Edits of characters and their LoRAs. A user edits own ones; an administrator all.

`as_user`: the user who asks; None: an administrator. To a user, a character of someone else and
one of everybody are not there to be edited: NotFound, as where it does not exist.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import delete, select

from gateway.errors import Forbidden, NotFound
from gateway.store.editing import Editor
from gateway.store.rows import row_of
from gateway.store.tables import character_loras, characters
from gateway.values.rows import CharacterLora
from gateway.values.seeds import SeedCharacter


def create_character(
    editor: Editor,
    character: SeedCharacter,
    *,
    owner_id: str | None,
    as_user: str | None = None,
) -> str:
    """A character of `owner_id` (None: everybody's); its id. A user makes own ones only."""
    if as_user is not None and owner_id != as_user:
        raise Forbidden("a user makes characters of their own")
    row = row_of(character, "loras")
    for name in ("system_prompt", "persona"):
        editor.check_text(row[name])
    character_id: str = editor.create(characters, {**row, "owner_id": owner_id})
    _set_loras(editor, character_id, character.loras)
    return character_id


def change_character(
    editor: Editor, character_id: str, values: Mapping[str, Any], *, as_user: str | None
) -> bool:
    """Change columns, and all LoRAs where `values` has "loras" (of CharacterLora)."""
    _own(editor, character_id, as_user)
    if as_user is not None and values.get("owner_id", as_user) != as_user:
        raise Forbidden("a user's character stays theirs")
    columns = {name: one for name, one in values.items() if name != "loras"}
    for name in ("system_prompt", "persona"):
        if isinstance(columns.get(name), str):
            editor.check_text(columns[name])
    changed = editor.change(characters, character_id, columns)
    if "loras" in values:
        return _set_loras(editor, character_id, values["loras"]) or changed
    return changed


def remove_character(editor: Editor, character_id: str, *, as_user: str | None) -> None:
    """Delete it with its LoRAs."""
    _own(editor, character_id, as_user)
    editor.remove(characters, character_id)


def _own(editor: Editor, character_id: str, as_user: str | None) -> None:
    owner = editor.find(characters, character_id)["owner_id"]
    if as_user is not None and owner != as_user:
        raise NotFound(f"characters has no row {character_id}")


def _set_loras(editor: Editor, character_id: str, loras: Iterable[CharacterLora]) -> bool:
    wanted = {(one.lora_ref, one.target_model): row_of(one) for one in loras}
    mine = character_loras.c.character_id == character_id
    present = {
        (row["lora_ref"], row["target_model"]): dict(row)
        for row in editor.connection.execute(select(character_loras).where(mine)).mappings()
    }
    changed = False
    for key, row in present.items():
        if key not in wanted:
            editor.remove(character_loras, row["id"])
            changed = True
    for key, row in wanted.items():
        if key in present:
            changed = editor.change(character_loras, present[key]["id"], row) or changed
        else:
            editor.create(character_loras, {**row, "character_id": character_id})
            changed = True
    return changed


def remove_characters_of(editor: Editor, owner_id: str) -> int:
    """Delete all characters of a user; how many. For the deletion of an account."""
    gone = editor.connection.execute(
        delete(characters).where(characters.c.owner_id == owner_id)
    ).rowcount
    editor.audit("remove", f"users/{owner_id}/characters", {"count": gone})
    return gone
