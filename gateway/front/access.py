"""What each route asks of its callers, checked before its body is read.

A view says it with `needs`; a view that says nothing is closed to everybody. Routes are open only
by `is_open`: /health, and a callback, whose signature stands in the place of a key.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar, cast

from flask import Flask, g, request

from gateway.access.caller import Caller, Scope, authorise
from gateway.access.gate import Gate

View = TypeVar("View", bound=Callable[..., Any])

_NEEDED = "needed_scopes"
_OPEN = "open_to_all"
_BROWSER = "takes_basic"


def needs(*scopes: Scope) -> Callable[[View], View]:
    """Below `@api.post(…)`: one of these scopes lets a caller pass."""

    def mark(view: View) -> View:
        setattr(view, _NEEDED, frozenset(scopes))
        return _readable(view)

    return mark


def is_open(view: View) -> View:
    """Anybody may call it; the caller's credentials are not even looked at, so that a prober with
    an old key does not take a healthy gateway for dead."""
    setattr(view, _OPEN, True)
    return _readable(view)


def for_browsers(view: View) -> View:
    """A page: takes its key as the password of HTTP Basic too, since a browser sends no Bearer by
    itself. Pages change nothing, so a foreign site gains nothing by linking them."""
    setattr(view, _BROWSER, True)
    return view


def _readable(view: View) -> View:
    # flask-openapi3 evaluates all annotations of a view, and the names that Flask's own type of
    # return values refers to do not exist at run time.
    view.__annotations__.pop("return", None)
    return view


def caller() -> Caller:
    """Who sent the request that this thread answers."""
    return cast(Caller, g.caller)


def needed_by(view: Callable[..., Any]) -> frozenset[Scope] | None:
    """The scopes of which a view asks one; None: it is open."""
    if getattr(view, _OPEN, False):
        return None
    return cast("frozenset[Scope]", getattr(view, _NEEDED, frozenset()))


def check(app: Flask, gate: Gate) -> None:
    """Find and judge the caller of the present request; called once, before its view.

    Raises Unauthorized or Forbidden. A wrong key is refused on every route that is not open, also
    where no route is: its sender is mistaken about something and would not notice otherwise.
    """
    g.caller = None
    if request.method == "OPTIONS":
        return
    view = app.view_functions.get(request.endpoint or "")
    needed = frozenset[Scope]() if view is None else needed_by(view)
    if needed is None:
        return
    g.caller = gate.identify(
        request.headers.get("Authorization"),
        request.headers.get("apikey"),
        takes_basic=bool(getattr(view, _BROWSER, False)),
        address=request.remote_addr or "",
    )
    if view is not None:
        authorise(g.caller, needed)
