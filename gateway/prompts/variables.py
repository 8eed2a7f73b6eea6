"""The names that a template may use, and what they stand for in one request."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from gateway.errors import Invalid, NotFound, TooLarge
from gateway.values.assembly import AssembleRequest, Step
from gateway.values.rows import NSFW, SFW, Character, Snapshot

# Texts of all variables of one request together. With the bound on a template's work (language.py)
# it bounds the time of a rendering; the request's own prompt has a lower limit at the front.
MAX_CHARS = 100_000
MAX_ITEMS = 64  # of a list; more are refused, since a loop costs this many rounds at most

# What a character has. With a character all of them are there, empty where its card lacks one;
# without a character none is.
CHARACTER = (
    "character_name",
    "character_description",
    "character_personality",
    "character_background",
    "character_speaking_style",
    "character_goals",
    "character_quirks",
    "character_relationships",
    "character_persona",
    "character_system_prompt",
    "character_visual_description",
    "character_tags",
    "voice_tone",
    "voice_examples",
    "mood",
)

Value = str | tuple[str, ...]


def find_character(snapshot: Snapshot, request: AssembleRequest) -> Character | None:
    """The request's character, None without one.

    Raises NotFound where there is none of the id, where it is switched off, and where it belongs
    to someone else: who owns it is not said.
    """
    if request.character_id is None:
        return None
    character = snapshot.character(request.character_id)
    if character is None or character.owner_id not in (None, request.user_id):
        raise NotFound("there is no such character; list them to see the ids")
    if not character.is_active:
        raise NotFound("the character is switched off; choose another one")
    return character


def is_withheld(character: Character | None, content_mode: str) -> bool:
    """Whether the character's texts stay out: it is rated nsfw and the mode is sfw."""
    return character is not None and character.content_rating == NSFW and content_mode == SFW


def character_step(character: Character | None, withheld: bool) -> Step:
    if character is None:
        return Step(step="character", outcome="none", why="the request names no character")
    detail = {"id": character.id, "content_rating": character.content_rating}
    if withheld:
        why = "rated nsfw in sfw mode: its name is used, its texts, tags, adapters and defaults not"
        return Step(step="character", outcome="withheld", why=why, detail=detail)
    return Step(step="character", outcome="chosen", why="the request names it", detail=detail)


def variables_for(
    request: AssembleRequest, character: Character | None, withheld: bool
) -> dict[str, Value]:
    """Names and values, all text or lists of text.

    The stronger last: a character's card, its own columns, request.variables, and `prompt`, which
    is always the request's own. Of a character that is withheld the names are there, so that a
    template still renders, and all but its name are empty.

    Raises TooLarge above MAX_CHARS or MAX_ITEMS, Invalid for a name that begins with "_".
    """
    values: dict[str, Value] = {}
    if character is not None:
        values.update(_of_character(character, withheld))
    for name, given in request.variables.items():
        if name.startswith("_"):
            raise Invalid("a variable's name may not begin with an underscore")
        values[name] = _text(given)
    values["prompt"] = request.prompt
    total = 0
    for value in values.values():
        if isinstance(value, tuple):
            if len(value) > MAX_ITEMS:
                raise TooLarge(f"a list has {len(value)} items; {MAX_ITEMS} are the most")
            total += sum(map(len, value))
        else:
            total += len(value)
    if total > MAX_CHARS:
        raise TooLarge(f"the variables have {total} characters; {MAX_CHARS} are the most")
    return values


def _of_character(character: Character, withheld: bool) -> dict[str, Value]:
    values: dict[str, Value] = dict.fromkeys(CHARACTER, "")
    values["character_tags"] = values["voice_examples"] = ()
    values.update(_of_card(character.card))
    values["character_tags"] = tuple(character.tags)
    for name, text in (
        ("character_persona", character.persona),
        ("character_system_prompt", character.system_prompt),
        ("voice_tone", character.voice_tone),
        ("mood", character.mood),
    ):
        if text or isinstance(values[name], tuple):
            values[name] = text
    if withheld:
        values = {name: () if isinstance(one, tuple) else "" for name, one in values.items()}
    values["character_name"] = character.name
    return values


def _of_card(card: Mapping[str, Any]) -> dict[str, Value]:
    """Texts, numbers and lists of them. Anything deeper is no text and stays unknown, so that a
    template that wants it fails by its name."""
    values: dict[str, Value] = {}
    for name, value in card.items():
        if value is None or name.startswith("_"):
            continue
        if isinstance(value, list | tuple):
            if all(isinstance(one, str | int | float) for one in value):
                values[name] = tuple(_text(one) for one in value)
        elif isinstance(value, str | int | float):
            values[name] = _text(value)
    return values


def _text(value: str | int | float) -> str:
    return value if isinstance(value, str) else str(value)
