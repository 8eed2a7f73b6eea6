"""What a request may be before anything looks at it: its size, its type, its JSON, its id.

JSON is read here, once, for every route: views get an object of plain values that both databases
can hold, or the request is refused.
"""

from __future__ import annotations

import json
import math
import re
import uuid
from typing import Any

from flask import Request, request
from werkzeug.exceptions import UnsupportedMediaType

from gateway.errors import InvalidRequest, TooLarge, has_trap_word

MAX_DEPTH = 32  # of nested objects and lists; a card or match is three deep
_REQUEST_ID = re.compile(r"[A-Za-z0-9._-]{1,64}")  # 64: the column of prompt_logs
_DIGITS = re.compile(r"[0-9]{1,18}")  # fits the database's 64 bits


class JsonRequest(Request):
    """Flask's request with our reading of JSON in the place of its own."""

    def get_data(
        self, cache: bool = True, as_text: bool = False, parse_form_data: bool = False
    ) -> Any:
        """The body's bytes, kept: a signature is over them. Raises TooLarge."""
        limit = self.max_content_length
        if limit is not None and self.content_length is None and not hasattr(self, "_raw"):
            # Werkzeug ends a body of unknown length silently at the limit, as if that were all.
            self.max_content_length = limit + 1
        self._raw = super().get_data(cache=True)
        self.max_content_length = limit
        if limit is not None and len(self._raw) > limit:
            raise TooLarge(f"the body has more than {limit} bytes, which is what this route takes")
        return self._raw.decode("utf-8", "replace") if as_text else self._raw

    def get_json(self, force: bool = False, silent: bool = False, cache: bool = True) -> Any:
        """The body as an object; {} for an empty one. Raises InvalidRequest, UnsupportedMediaType,
        TooLarge, whatever `silent` says: the library that validates bodies would take a body that
        cannot be read for a missing one."""
        if not hasattr(self, "_parsed"):
            self._parsed = self._read()
        return self._parsed

    def _read(self) -> dict[str, Any]:
        raw = self.get_data()
        if not raw:
            return {}
        if self.mimetype != "application/json":
            raise UnsupportedMediaType("send the body as application/json")
        return parse_object(raw)


def check_size() -> None:
    """Raise TooLarge for a body whose length is told and over the limit, before it is read. One
    that does not tell it is refused by JsonRequest while it is read."""
    limit = request.max_content_length
    length = request.content_length
    if limit is not None and length is not None and length > limit:
        raise TooLarge(f"the body has {length} bytes; this route takes {limit}")


def parse_object(raw: bytes) -> dict[str, Any]:
    """A JSON object without NaN, numbers beyond a float, NUL, lone surrogates (no database takes
    those) and nesting beyond MAX_DEPTH. Raises InvalidRequest."""
    try:
        parsed = json.loads(raw.decode("utf-8"), parse_constant=_refuse, parse_float=_number)
    except (ValueError, RecursionError) as exc:
        raise InvalidRequest("the body is not JSON that can be read") from exc
    if not isinstance(parsed, dict):
        raise InvalidRequest("the body is not a JSON object")
    _check_values(parsed)
    return parsed


def request_id() -> str:
    """The client's id, when it is one that may stand in a log line and in an error body; else
    one of ours."""
    given = request.headers.get("X-Request-Id")
    if given is not None and _REQUEST_ID.fullmatch(given) and not has_trap_word(given):
        return given
    return uuid.uuid4().hex


def number_header(name: str) -> int | None:
    """A header that holds a revision: digits, with the quotes of an ETag or without; None where it
    is absent. Raises InvalidRequest."""
    given = request.headers.get(name)
    if given is None:
        return None
    digits = given.strip().removeprefix("W/").strip('"')
    if not _DIGITS.fullmatch(digits):
        raise InvalidRequest(f"{name} is a revision: a number of 18 digits at most")
    return int(digits)


def _refuse(_name: str) -> float:
    raise ValueError("no JSON number")


def _number(text: str) -> float:
    value = float(text)
    if not math.isfinite(value):
        raise ValueError("a number that no float holds")
    return value


def _check_values(top: dict[str, Any]) -> None:
    waiting: list[tuple[Any, int]] = [(top, 1)]
    while waiting:
        value, depth = waiting.pop()
        if isinstance(value, str):
            _check_text(value)
        elif isinstance(value, dict | list):
            if depth > MAX_DEPTH:
                raise InvalidRequest(f"the body is nested deeper than {MAX_DEPTH}")
            if isinstance(value, dict):
                for key in value:
                    _check_text(key)
            inner = value.values() if isinstance(value, dict) else value
            waiting.extend((one, depth + 1) for one in inner)


def _check_text(text: str) -> None:
    if "\0" in text:
        raise InvalidRequest("the body has a NUL character")
    if not text.isascii():
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as exc:
            raise InvalidRequest("the body has half of a surrogate pair") from exc
