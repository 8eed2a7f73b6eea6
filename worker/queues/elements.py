"""What producers put into a list, to the job bodies in it.

Existing producers have stored a body in four ways: the JSON object itself, `{"data": "<json>"}`,
`["<json>"]`, and JSON of a JSON text. All of them are read, and any of them inside another. An
element that is not plainly one of them is malformed as a whole: half of it is never run.
"""

from __future__ import annotations

import json
import math
from typing import Any, NoReturn

MAX_ELEMENT_BYTES = 1 << 20  # real ones have 2 to 10 KiB
MAX_LAYERS = 8  # texts, arrays and `data` objects around a body; real ones have at most 2


class MalformedElement(Exception):
    """The element holds no job that can be read; `reason` says why, without the user's text."""

    def __init__(self, reason: str):
        super().__init__(reason)
        self.reason = reason


def decode_element(element: bytes) -> list[dict[str, Any]]:
    """The job bodies of a stored element, in their order; at least one.

    Refused, because two readers would understand two different jobs: a key twice in one object,
    constants that JSON does not have, a number that no float holds, bytes that are not UTF-8.
    Raises MalformedElement.
    """
    if len(element) > MAX_ELEMENT_BYTES:
        raise MalformedElement(
            f"the element has {len(element)} bytes; allowed: at most {MAX_ELEMENT_BYTES}"
        )
    try:
        text = element.decode("utf-8")
    except UnicodeDecodeError as exc:
        raise MalformedElement(f"the element is not UTF-8 from byte {exc.start} on") from None
    return _bodies(_parse(text), 0)


def job_id_of(body: dict[str, Any]) -> str | None:
    """`id`, else `job_id`, as a text; None when neither is a text or a whole number.

    It is for telling somebody about a body that may be wrong in any other way, so a text that
    UTF-8 cannot hold counts as none.
    """
    for key in ("id", "job_id"):
        value = body.get(key)
        if isinstance(value, int) and not isinstance(value, bool):
            return str(value)
        if isinstance(value, str) and value and not _has_lone_surrogate(value):
            return value
    return None


def _bodies(value: Any, layers: int) -> list[dict[str, Any]]:
    if layers > MAX_LAYERS:
        raise MalformedElement(f"the job is wrapped more than {MAX_LAYERS} times")
    if isinstance(value, str):
        return _bodies(_parse(value), layers + 1)
    if isinstance(value, list):
        if not value:
            raise MalformedElement("an array in it is empty")
        return [body for item in value for body in _bodies(item, layers + 1)]
    if not isinstance(value, dict):
        raise MalformedElement("it holds null, a number or a boolean where a job should be")
    if value.keys() == {"data"}:
        return _bodies(value["data"], layers + 1)
    return [value]


def _parse(text: str) -> Any:
    try:
        return json.loads(
            text,
            object_pairs_hook=_object,
            parse_int=_integer,
            parse_float=_float,
            parse_constant=_refuse_constant,
        )
    except json.JSONDecodeError as exc:
        raise MalformedElement(f"a text in it is not JSON at character {exc.pos}") from None
    except RecursionError:
        raise MalformedElement("its JSON is nested too deeply") from None


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    values = dict(pairs)
    if len(values) != len(pairs):
        raise MalformedElement("an object in it has the same key twice")
    return values


def _integer(digits: str) -> int:
    try:
        value = int(digits)
        float(value)
    except (ValueError, OverflowError):  # thousands of digits; hundreds of them
        raise _beyond_float() from None
    return value


def _float(digits: str) -> float:
    value = float(digits)
    if math.isinf(value):
        raise _beyond_float()
    return value


def _beyond_float() -> MalformedElement:
    return MalformedElement("a number in it is larger than a float can be")


def _refuse_constant(_name: str) -> NoReturn:
    raise MalformedElement("it has a constant that JSON does not have")


def _has_lone_surrogate(text: str) -> bool:
    return any("\ud800" <= char <= "\udfff" for char in text)
