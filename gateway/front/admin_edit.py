"""What all edits over HTTP have in common: who may, on which revision, and what is answered."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any, TypeVar

from gateway.access.caller import Caller, Scope, authorise, implied
from gateway.errors import Forbidden, InvalidRequest
from gateway.front import revision
from gateway.front.access import caller
from gateway.front.admin_bodies import EditBody, PageQuery
from gateway.front.services import Services
from gateway.prompts.language import check_template
from gateway.store.editing import Editor, edit

Row = TypeVar("Row")

PUBLISH = frozenset({Scope.PUBLISHER})


def actor() -> str:
    """Who edits, for the audit log: names of keys are unique among keys only."""
    who = caller()
    return f"{who.kind}:{who.name}"


@contextmanager
def editing(services: Services, body: EditBody | None = None) -> Iterator[Editor]:
    """A transaction of edits by the caller, on the revision that the caller expects, if any. This
    process looks at the database as soon as it is committed."""
    expected = revision.expected(None if body is None else body.expected_revision)
    with edit(
        services.database,
        actor=actor(),
        expected_revision=expected,
        at=services.wall(),
        check_text=lambda text, _variables: check_template(text),
    ) as editor:
        yield editor
    services.prompts.wake()


def allow_live(*is_active: object) -> None:
    """An editor may touch what no request uses: rows that are switched off before and after. For
    anything else: raises Forbidden without the scope publisher."""
    if not any(is_active):
        return
    try:
        authorise(caller(), PUBLISH)
    except Forbidden as exc:
        raise Forbidden(
            "a row that is switched on needs the scope publisher; an editor makes it with "
            "is_active false"
        ) from exc


def holds(who: Caller, scope: Scope) -> bool:
    return scope in implied(who.scopes)


def answer(editor: Editor, **more: Any) -> dict[str, Any]:
    """The answer of an edit, after its transaction: X-GW-Min-Revision with this revision sees
    it."""
    return {"success": True, "revision": editor.revision, **more}


def page(
    rows: Iterable[Row],
    query: PageQuery,
    key: Callable[[Row], int | str],
    shown: Callable[[Row], Mapping[str, Any]],
) -> dict[str, Any]:
    """One page of rows in the order of their keys. Raises InvalidRequest for a cursor that this
    list does not give."""
    wanted = sorted(
        (
            row
            for row in rows
            if query.is_active is None or getattr(row, "is_active", True) is query.is_active
        ),
        key=key,
    )
    found = wanted if query.cursor is None else _after(wanted, query.cursor, key)
    shown_rows = [shown(row) for row in found[: query.limit]]
    more = len(found) > query.limit
    return {
        "success": True,
        "rows": shown_rows,
        "count": len(shown_rows),
        "next": str(key(found[query.limit - 1])) if more else None,
    }


def _after(rows: Sequence[Row], cursor: str, key: Callable[[Row], int | str]) -> list[Row]:
    if not rows:
        return []
    if isinstance(key(rows[0]), str):
        return [row for row in rows if str(key(row)) > cursor]
    return [row for row in rows if int(key(row)) > number(cursor)]


def number(cursor: str) -> int:
    """A cursor that is an id."""
    if not cursor.isascii() or not cursor.isdecimal() or len(cursor) > 18:
        raise InvalidRequest("this cursor was not given by this list")
    return int(cursor)
