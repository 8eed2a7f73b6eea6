"""Edits of characters and their LoRAs. A user edits own ones; an administrator all.

`as_user`: the user who asks; None: an administrator. To a user, a character of someone else and
one of everybody are not there to be edited: NotFound, as where it does not exist.

Texts of characters are data that no template engine reads, so braces in them are taken as they
are. Every process holds all characters in memory, so what belongs to a user has limits; what is
everybody's is the administrators' own affair. The audit log has no texts of a user's characters.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from sqlalchemy import func, select

from gateway.errors import Forbidden, NotFound, TooLarge
from gateway.store.canonical import canonical_json
from gateway.store.editing import Editor
from gateway.store.rows import row_of
from gateway.store.tables import character_loras, characters
from gateway.values.rows import CharacterLora
from gateway.values.seeds import SeedCharacter

# Of one user.
MAX_OWNED = 50  # rows
MAX_CHARS: Mapping[str, int] = {"persona": 8000, "system_prompt": 8000}
# As canonical JSON in UTF-8.
MAX_BYTES: Mapping[str, int] = {"card": 32 * 1024, "defaults": 4096, "tags": 4096}
MAX_LORAS = 16  # of one character
MAX_TRIGGER_BYTES = 2048  # of one adapter's trigger words, as JSON

# What a user writes. The texts of an owned character are personal: see Editor.create.
TEXTS = frozenset((*MAX_CHARS, *MAX_BYTES, "name", "voice_tone", "mood"))
LORA_TEXTS = frozenset(("lora_ref", "target_model", "trigger_words"))
NOTHING: frozenset[str] = frozenset()


def create_character(
    editor: Editor,
    character: SeedCharacter,
    *,
    owner_id: str | None,
    as_user: str | None = None,
) -> str:
    """A character of `owner_id` (None: everybody's); its id. A user makes own ones only.

    Raises TooLarge where the owner has MAX_OWNED already, or for a text above its limit.
    """
    if as_user is not None and owner_id != as_user:
        raise Forbidden("a user makes characters of their own")
    row = {**row_of(character, "loras"), "owner_id": owner_id}
    is_owned = owner_id is not None
    character_id: str = editor.create(characters, row, personal=TEXTS if is_owned else NOTHING)
    _set_loras(editor, character_id, character.loras, is_owned)
    if owner_id is not None:
        _check_count(editor, owner_id)
        _check_sizes(row)
        _check_loras(editor, character_id)
    return character_id


def change_character(
    editor: Editor, character_id: str, values: Mapping[str, Any], *, as_user: str | None
) -> bool:
    """Change columns, and all LoRAs where `values` has "loras" (of CharacterLora).

    Raises TooLarge as create_character does; a text that stays is checked only where the
    character gets another owner.
    """
    before = _own(editor, character_id, as_user)
    if as_user is not None and values.get("owner_id", as_user) != as_user:
        raise Forbidden("a user's character stays theirs")
    columns = {name: one for name, one in values.items() if name != "loras"}
    owner_id = columns.get("owner_id", before["owner_id"])
    is_owned = owner_id is not None or before["owner_id"] is not None
    changed = editor.change(
        characters, character_id, columns, personal=TEXTS if is_owned else NOTHING
    )
    if "loras" in values:
        changed = _set_loras(editor, character_id, values["loras"], is_owned) or changed
    if owner_id is not None:
        is_new = owner_id != before["owner_id"]
        if is_new:
            _check_count(editor, owner_id)
        _check_sizes({**before, **columns} if is_new else columns)
        if is_new or "loras" in values:
            _check_loras(editor, character_id)
    return changed


def remove_character(editor: Editor, character_id: str, *, as_user: str | None) -> None:
    """Delete it with its LoRAs."""
    is_owned = _own(editor, character_id, as_user)["owner_id"] is not None
    editor.remove(characters, character_id, personal=TEXTS if is_owned else NOTHING)


def _own(editor: Editor, character_id: str, as_user: str | None) -> dict[str, Any]:
    row = editor.find(characters, character_id)
    if as_user is not None and row["owner_id"] != as_user:
        raise NotFound(f"characters has no row {character_id}")
    return row


# The limits are looked at after the write, which has checked that the values are what their
# columns hold; an error takes the write back with its transaction.


def _check_count(editor: Editor, owner_id: str) -> None:
    count = editor.connection.execute(
        select(func.count()).select_from(characters).where(characters.c.owner_id == owner_id)
    ).scalar_one()
    if count > MAX_OWNED:
        raise TooLarge(
            f"this user has {count - 1} characters, and {MAX_OWNED} are the most: delete one first"
        )


def _check_sizes(row: Mapping[str, Any]) -> None:
    for name, most in MAX_CHARS.items():
        if name in row and len(row[name]) > most:
            raise TooLarge(f"{name} has {len(row[name])} characters; {most} are the most")
    for name, most in MAX_BYTES.items():
        if name in row:
            _check_bytes(name, row[name], most)


def _check_loras(editor: Editor, character_id: str) -> None:
    mine = character_loras.c.character_id == character_id
    found = editor.connection.execute(select(character_loras.c.trigger_words).where(mine))
    triggers = found.scalars().all()
    if len(triggers) > MAX_LORAS:
        raise TooLarge(f"the character has {len(triggers)} adapters; {MAX_LORAS} are the most")
    for one in triggers:
        _check_bytes("trigger_words", one, MAX_TRIGGER_BYTES)


def _check_bytes(name: str, value: Any, most: int) -> None:
    size = len(canonical_json(value))
    if size > most:
        raise TooLarge(f"{name} has {size} bytes as JSON; {most} are the most")


def _set_loras(
    editor: Editor, character_id: str, loras: Iterable[CharacterLora], is_owned: bool
) -> bool:
    personal = LORA_TEXTS if is_owned else NOTHING
    wanted = {(one.lora_ref, one.target_model): row_of(one) for one in loras}
    mine = character_loras.c.character_id == character_id
    present = {
        (row["lora_ref"], row["target_model"]): dict(row)
        for row in editor.connection.execute(select(character_loras).where(mine)).mappings()
    }
    changed = False
    for key, row in present.items():
        if key not in wanted:
            editor.remove(character_loras, row["id"], personal=personal)
            changed = True
    for key, row in wanted.items():
        if key in present:
            lora_id = present[key]["id"]
            changed = editor.change(character_loras, lora_id, row, personal=personal) or changed
        else:
            own = {**row, "character_id": character_id}
            editor.create(character_loras, own, personal=personal)
            changed = True
    return changed
