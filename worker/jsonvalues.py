"""Values of a client's JSON, read strictly, and what of them an answer may repeat."""

from __future__ import annotations

import math
from typing import Any, TypeVar

from worker.errors import InvalidRequest, OutOfRange

MAX_SHOWN_KEY_CHARS = 100
MAX_SHOWN_NUMBER = 2**63  # JSON may hold 1e999, which is no finite float, or a thousand digits
MAX_KEEP_ALIVE_S = 86400.0  # a day

T = TypeVar("T")
N = TypeVar("N", int, float)


def whole_number(name: str, value: Any, default: T) -> int | T:
    """`value` as an int; `default` when it is null. 62.0 is 62: some clients know one number type.

    Raises InvalidRequest for anything else.
    """
    if value is None:
        return default
    if isinstance(value, float) and value.is_integer():
        return int(value)
    if isinstance(value, bool) or not isinstance(value, int):
        raise InvalidRequest(f"{name} must be a whole number")
    return value


def keep_alive_s(value: Any) -> float | None:
    """Seconds of a request's `keep_alive`; None when it is null. Raises InvalidRequest, and
    OutOfRange beyond a day."""
    if value is None:
        return None
    return within("keep_alive", real_number("keep_alive", value, 0.0), 0.0, MAX_KEEP_ALIVE_S)


def real_number(name: str, value: Any, default: float) -> float:
    """`value` as a float; `default` when it is null. Raises InvalidRequest for anything else."""
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise InvalidRequest(f"{name} must be a number")
    try:
        return float(value)
    except OverflowError:  # a whole number of more than 300 digits
        return math.inf if value > 0 else -math.inf


def above_zero(name: str, value: float, most: float) -> float:
    """`value`, when it is above 0 and at most `most`. Raises OutOfRange with the range."""
    if not 0 < value <= most:
        shown = f"{value:g}" if abs(value) <= MAX_SHOWN_NUMBER else "too large a number"
        raise OutOfRange(f"{name} is {shown}; allowed: above 0, at most {most:g}")
    return value


def within(name: str, value: N, least: float, most: float) -> N:
    """`value`, when it lies between both bounds. Raises OutOfRange with the range."""
    if not least <= value <= most:
        shown = f"{value}" if abs(value) <= MAX_SHOWN_NUMBER else "too large a number"
        allowed = f"from {least} to {most}" if least != most else f"{least}"
        raise OutOfRange(f"{name} is {shown}; allowed: {allowed}")
    return value


def refuse_lone_surrogates(name: str, text: str) -> None:
    """JSON can escape half of a surrogate pair, which no UTF-8 text and no tokenizer can hold."""
    for index, char in enumerate(text):
        if "\ud800" <= char <= "\udfff":
            raise InvalidRequest(
                f"{name} has an unpaired surrogate (U+{ord(char):04X}) at character {index}; "
                "it is not a Unicode text"
            )


def shown_key(key: str) -> str:
    """A client's key as answers may repeat it: short, and a text that UTF-8 can hold."""
    short = key if len(key) <= MAX_SHOWN_KEY_CHARS else key[:MAX_SHOWN_KEY_CHARS] + "…"
    return short.encode("utf-8", "backslashreplace").decode()
