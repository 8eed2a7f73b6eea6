"""The filters and tests that templates may use: own functions on text and lists, bounded.

Jinja2's own are not used: several build text of any length, read attributes or call what they get.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from jinja2 import Undefined

from gateway.errors import TemplateFault

MAX_TEXT = 1_000_000  # characters that a filter may give; upper() of some letters is three
ITEMS = "_items"  # put around the list of every loop by the compiler; not for templates


def shown(value: Any) -> str:
    """What `{{ value }}` writes: a list one item per line, nothing for none."""
    if isinstance(value, str):
        return value
    if isinstance(value, Undefined):
        return str(value)  # raises, with the name
    if isinstance(value, tuple):
        return "\n".join(value)
    if value is None:
        return ""
    if isinstance(value, bool):
        return "true" if value else "false"
    return str(value)


def _bounded(text: str) -> str:
    if len(text) > MAX_TEXT:
        raise TemplateFault(f"a filter gave {len(text)} characters; {MAX_TEXT} are the most")
    return text


def _upper(value: Any) -> str:
    return _bounded(shown(value).upper())


def _lower(value: Any) -> str:
    return _bounded(shown(value).lower())


def _capitalize(value: Any) -> str:
    return _bounded(shown(value).capitalize())


def _title(value: Any) -> str:
    return _bounded(shown(value).title())


def _trim(value: Any) -> str:
    return shown(value).strip()


def _length(value: Any) -> int:
    return len(value) if isinstance(value, tuple) else len(shown(value))


def _wordcount(value: Any) -> int:
    return len(shown(value).split())


def _first(value: Any) -> str:
    items = _items(value)
    return items[0] if items else ""


def _last(value: Any) -> str:
    items = _items(value)
    return items[-1] if items else ""


def _join(value: Any, separator: Any = ", ") -> str:
    return _bounded(shown(separator).join(_items(value)))


def _truncate(value: Any, length: Any = 255) -> str:
    """The first `length` characters, without an ellipsis."""
    if not isinstance(length, int) or length < 0:
        raise TemplateFault("truncate takes a number of characters, from 0")
    return shown(value)[:length]


def _default(value: Any, instead: Any = "") -> Any:
    """`instead` where the name is unknown or its text is empty."""
    if isinstance(value, Undefined) or value in ("", (), None):
        return instead
    return value


def _items(value: Any) -> tuple[str, ...]:
    if isinstance(value, Undefined):
        str(value)  # raises, with the name
    if not isinstance(value, tuple):
        raise TemplateFault("a list is needed where there is a text")
    return value


FILTERS: dict[str, Callable[..., Any]] = {
    "upper": _upper,
    "lower": _lower,
    "capitalize": _capitalize,
    "title": _title,
    "trim": _trim,
    "length": _length,
    "wordcount": _wordcount,
    "first": _first,
    "last": _last,
    "join": _join,
    "truncate": _truncate,
    "default": _default,
    ITEMS: _items,
}
WITH_ARGUMENT = frozenset({"join", "truncate", "default"})  # one, a constant


def _is_defined(value: Any) -> bool:
    return not isinstance(value, Undefined)


def _is_undefined(value: Any) -> bool:
    return isinstance(value, Undefined)


def _is_none(value: Any) -> bool:
    return value is None


TESTS: dict[str, Callable[..., bool]] = {
    "defined": _is_defined,
    "undefined": _is_undefined,
    "none": _is_none,
}
