"""The three tables of a job body: `config`, the top level and `metadata`, read strictly.

Existing clients say one thing under several names and in several places. Every read names the
places in the order in which they count, and `Fields` remembers which keys were read, so that the
others can be listed as ignored.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, TypeVar
from urllib.parse import urlsplit

from worker.errors import InvalidRequest, OutOfRange, Unsupported
from worker.jsonvalues import real_number, refuse_lone_surrogates, shown_key, whole_number

CONFIG, ROOT, METADATA = "config", "", "metadata"
# Where a value is looked for, first one first.
USUAL = (CONFIG, ROOT)
EVERYWHERE = (CONFIG, ROOT, METADATA)

# Keys that ask for something by being there. With a value that asks for nothing they are not worth
# a line in the list of what was ignored: clients send many of them with every job.
_ASKING = frozenset(
    {
        "compel_enabled",
        "compel_weights",
        "end_reference_url",
        "exact_copy_mode",
        "first_frame",
        "image",
        "last_frame",
        "loras",
        "reference_image_url",
        "reference_mode",
        "reference_type",
        "start_reference_url",
        "video_reference_mode",
    }
)

T = TypeVar("T")


def is_null(value: Any) -> bool:
    return value is None


def is_null_or_false(value: Any) -> bool:
    return value is None or value is False


def asks_for_nothing(value: Any) -> bool:
    """Whether a value is null, false or empty. 0 is a number, and no such value."""
    return is_null_or_false(value) or (isinstance(value, str | list | dict) and not value)


class Fields:
    """One body being read. Owned by the decoder of that body."""

    def __init__(self, body: dict[str, Any]):
        """Raises InvalidRequest when `config` or `metadata` is not an object."""
        self._tables = {
            CONFIG: _table(body, CONFIG),
            ROOT: body,
            METADATA: _table(body, METADATA),
        }
        self._used = {(ROOT, CONFIG), (ROOT, METADATA)}
        self._also_ignored: list[str] = []

    def first(
        self,
        *keys: str,
        tables: tuple[str, ...] = USUAL,
        absent: Callable[[Any], bool] = is_null,
    ) -> Any:
        """The first value that is there and not `absent`, by table and then by key, else None.

        All these keys count as used: they are names of the same thing.
        """
        found = None
        for table in tables:
            for key in keys:
                if key not in self._tables[table]:
                    continue
                self._used.add((table, key))
                value = self._tables[table][key]
                if found is None and not absent(value):
                    found = value
        return found

    def asked(self, *keys: str, tables: tuple[str, ...] = USUAL) -> Any:
        """As `first`, of values that ask for something."""
        return self.first(*keys, tables=tables, absent=asks_for_nothing)

    def has(self, *keys: str) -> bool:
        """Whether the config or the top level has one of these keys, which are not used by it."""
        return any(self._tables[table].get(key) is not None for table in USUAL for key in keys)

    def text(self, *keys: str, tables: tuple[str, ...] = USUAL) -> str | None:
        return checked_text(keys[0], self.first(*keys, tables=tables))

    def word(self, *keys: str, known: tuple[str, ...]) -> str | None:
        """One of `known`, or None where nothing is asked for.

        Raises InvalidRequest for another type, Unsupported for another word.
        """
        value = checked_text(keys[0], self.asked(*keys))
        if value is not None and value not in known:
            raise Unsupported(f"this {keys[0]} is unknown; known: {', '.join(known)}")
        return value

    def flag(self, *keys: str, tables: tuple[str, ...] = USUAL) -> bool:
        value = self.asked(*keys, tables=tables)
        if value is not None and value is not True:
            raise InvalidRequest(f"{keys[0]} must be true or false")
        return value is True

    def integer(self, *keys: str, default: T) -> int | T:
        return whole_number(keys[0], self.first(*keys), default)

    def number(self, *keys: str, default: float) -> float:
        return real_number(keys[0], self.first(*keys), default)

    def release(self, *keys: str) -> None:
        """Take back that these keys of the config and the top level were used."""
        self._used -= {(table, key) for table in USUAL for key in keys}

    def ignore(self, name: str) -> None:
        """List what was found inside a value and has no effect."""
        self._also_ignored.append(name)

    def ignored(self) -> tuple[str, ...]:
        """Names of what had no effect, sorted. A key that is null is as good as absent."""
        return tuple(sorted([*self._unused(), *self._also_ignored]))

    def _unused(self) -> Iterator[str]:
        for table, values in self._tables.items():
            for key, value in values.items():
                quiet = asks_for_nothing(value) if key in _ASKING else is_null(value)
                if not quiet and (table, key) not in self._used:
                    yield f"{table}.{shown_key(key)}".removeprefix(".")


def checked_text(name: str, value: Any) -> str | None:
    """Raises InvalidRequest for anything but a string or null."""
    if value is not None and not isinstance(value, str):
        raise InvalidRequest(f"{name} must be a string")
    return value


def checked_length(name: str, text: str, most: int) -> None:
    """Raises InvalidRequest for half a character, OutOfRange for more than `most` characters."""
    refuse_lone_surrogates(name, text)
    if len(text) > most:
        raise OutOfRange(f"{name} has {len(text)} characters; allowed: at most {most}")


def is_http_url(text: str) -> bool:
    """Whether `text` has the form of an http or https URL with a host.

    Where it leads is checked by whoever opens it.
    """
    if any(char <= " " or char == "\x7f" for char in text):
        return False  # urlsplit would take line ends and tabs out
    try:
        parts = urlsplit(text)
        port = parts.port
    except ValueError:
        return False
    return parts.scheme in ("http", "https") and bool(parts.hostname) and port != 0


def _table(body: dict[str, Any], key: str) -> dict[str, Any]:
    value = body.get(key)
    if value is None:
        return {}
    if not isinstance(value, dict):
        raise InvalidRequest(f"{key} must be an object")
    return value
