"""Frozen rows from TOML and JSON tables, and back. What a table must not have is refused."""

from __future__ import annotations

import dataclasses
import difflib
import types
import typing
from collections.abc import Mapping
from functools import cache
from typing import TYPE_CHECKING, Any, TypeVar

if TYPE_CHECKING:
    from _typeshed import DataclassInstance

_Row = TypeVar("_Row", bound="DataclassInstance")


def row_of(kind: type[_Row], table: Mapping[str, Any], *, is_whole: bool = False) -> _Row:
    """A dataclass of a table; keys that are left out have the class's default, and with `is_whole`
    none may be. Raises ValueError with the class and the key."""
    known, hints = _fields(kind)
    for name in table:
        if name not in known:
            near = difflib.get_close_matches(name, known, n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            raise ValueError(f"{kind.__name__} has no {name}{hint}")
    for name, one in known.items():
        is_needed = is_whole or one.default is one.default_factory is dataclasses.MISSING
        if name not in table and is_needed:
            raise ValueError(f"{kind.__name__} lacks {name}")
    return kind(
        **{
            name: _value(hints[name], value, f"{kind.__name__}.{name}", is_whole)
            for name, value in table.items()
        }
    )


@cache
def _fields(kind: Any) -> tuple[dict[str, dataclasses.Field[Any]], dict[str, Any]]:
    """The fields that a row is made of, and their types; both are only read."""
    known = {one.name: one for one in dataclasses.fields(kind) if one.init}
    return known, typing.get_type_hints(kind)


def table_of(value: Any) -> Any:
    """JSON values of rows; `row_of` gives equal ones."""
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {
            one.name: table_of(getattr(value, one.name))
            for one in dataclasses.fields(value)
            if one.init
        }
    if isinstance(value, Mapping):
        return {key: table_of(one) for key, one in value.items()}
    if isinstance(value, tuple | list):
        return [table_of(one) for one in value]
    return value


def _value(kind: Any, value: Any, where: str, is_whole: bool) -> Any:
    if dataclasses.is_dataclass(kind) and isinstance(kind, type):
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {type(value).__name__}, not a table")
        return row_of(kind, value, is_whole=is_whole)
    origin = typing.get_origin(kind)
    if origin is tuple:
        if not isinstance(value, list):
            raise ValueError(f"{where} is {type(value).__name__}, not a list")
        return tuple(_value(typing.get_args(kind)[0], one, where, is_whole) for one in value)
    if origin is Mapping:
        if not isinstance(value, dict):
            raise ValueError(f"{where} is {type(value).__name__}, not a table")
        return value
    allowed = typing.get_args(kind) if isinstance(kind, types.UnionType) else (kind,)
    if isinstance(value, bool) and bool not in allowed:
        raise ValueError(f"{where} is a truth value")
    if isinstance(value, int) and float in allowed:
        return float(value) if not isinstance(value, bool) else value
    if not isinstance(value, allowed):
        raise ValueError(f"{where} is {type(value).__name__}")
    return value
