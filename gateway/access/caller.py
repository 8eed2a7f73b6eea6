"""Who asks and what they may do. Decisions only: no database, no HTTP, no clock."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum

from gateway.errors import Forbidden, Invalid, Unauthorized
from gateway.values.rows import ANY


class Scope(StrEnum):
    """What a caller may do. Of the last four each holds those before it; the first two stand
    alone, so a worker's key edits nothing and an editor's key registers no worker."""

    CALL = "call"
    """Use the function and enhance routes."""
    WORKER = "worker"
    """Register workers, refresh."""
    VIEWER = "viewer"
    """Read the configuration and the logs."""
    EDITOR = "editor"
    """Make drafts: what no request uses yet."""
    PUBLISHER = "publisher"
    """Put drafts into use: move live versions, switch rows on and off."""
    ADMIN = "admin"
    """Providers, keys, users."""


_LADDER = (Scope.VIEWER, Scope.EDITOR, Scope.PUBLISHER, Scope.ADMIN)
ALL_SCOPES = frozenset(Scope)


@dataclass(frozen=True, slots=True, kw_only=True)
class Caller:
    """Whoever sent a request, as far as decisions need it."""

    kind: str  # user | key | service
    name: str  # for logs and the audit log; never a secret
    scopes: frozenset[Scope]
    user_id: str | None = None  # whose rows it sees; None: of nobody
    tier: str = ANY
    may_use_nsfw: bool = False
    content_mode: str | None = None  # the user's own setting
    is_admin: bool = False


def implied(scopes: frozenset[Scope]) -> frozenset[Scope]:
    """The scopes with those that they hold."""
    highest = max((_LADDER.index(one) for one in scopes if one in _LADDER), default=-1)
    return scopes | frozenset(_LADDER[: highest + 1])


def parse_scopes(names: object) -> frozenset[Scope]:
    """Scopes of a list of names. Raises Invalid with the names that exist."""
    if not isinstance(names, list | tuple | set | frozenset) or not names:
        raise Invalid("scopes is a list with one name or more of " + ", ".join(Scope))
    unknown = [name for name in names if name not in list(Scope)]
    if unknown:
        raise Invalid(f"{len(unknown)} of the scopes do not exist; there are " + ", ".join(Scope))
    return frozenset(Scope(name) for name in names)


def authorise(caller: Caller | None, needed: frozenset[Scope]) -> None:
    """Let a caller with one of the `needed` scopes pass. Raises Unauthorized without a caller,
    Forbidden without a scope. An empty `needed` lets nobody pass: a route that forgot to say what
    it needs is closed."""
    if caller is None:
        raise Unauthorized("this route needs a key: send it as Authorization: Bearer KEY")
    if implied(caller.scopes) & needed:
        return
    if not needed:
        raise Forbidden("this route is closed")
    raise Forbidden("this needs the scope " + " or ".join(sorted(needed)))


def owner(caller: Caller) -> str:
    """The user whose rows the caller sees. Raises Forbidden where it sees those of nobody."""
    if caller.user_id is None:
        raise Forbidden("this route keeps rows of a user; sign in, or use a key of a user")
    return caller.user_id
