"""Scopes: which one lets whom pass."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gateway.access.caller import Caller, Scope, authorise, implied, owner, parse_scopes
from gateway.errors import Forbidden, Invalid, Unauthorized

SCOPES = st.frozensets(st.sampled_from(list(Scope)))


def _caller(scopes: frozenset[Scope], user_id: str | None = None) -> Caller:
    return Caller(kind="key", name="k", scopes=scopes, user_id=user_id)


def test_each_scope_of_the_ladder_holds_those_below_it() -> None:
    assert implied(frozenset({Scope.ADMIN})) == {
        Scope.ADMIN,
        Scope.PUBLISHER,
        Scope.EDITOR,
        Scope.VIEWER,
    }
    assert implied(frozenset({Scope.EDITOR})) == {Scope.EDITOR, Scope.VIEWER}


def test_call_and_worker_stand_alone() -> None:
    assert implied(frozenset({Scope.CALL})) == {Scope.CALL}
    assert implied(frozenset({Scope.WORKER})) == {Scope.WORKER}
    assert Scope.CALL not in implied(frozenset({Scope.ADMIN}))
    assert Scope.WORKER not in implied(frozenset({Scope.ADMIN}))


@given(SCOPES, SCOPES)
def test_a_caller_passes_exactly_where_it_holds_one_of_the_needed_scopes(
    held: frozenset[Scope], needed: frozenset[Scope]
) -> None:
    may_pass = bool(implied(held) & needed)

    if may_pass:
        authorise(_caller(held), needed)
    else:
        with pytest.raises(Forbidden):
            authorise(_caller(held), needed)


@given(SCOPES)
def test_more_scopes_never_take_a_right_away(held: frozenset[Scope]) -> None:
    for more in Scope:
        assert implied(held) <= implied(held | {more})


def test_nobody_is_let_in_without_a_key() -> None:
    with pytest.raises(Unauthorized):
        authorise(None, frozenset(Scope))


def test_a_route_that_says_nothing_is_closed_to_an_administrator_too() -> None:
    with pytest.raises(Forbidden):
        authorise(_caller(frozenset(Scope)), frozenset())


def test_rows_of_users_are_refused_to_a_caller_that_is_no_user() -> None:
    assert owner(_caller(frozenset(), "u-1")) == "u-1"

    with pytest.raises(Forbidden):
        owner(_caller(frozenset(Scope)))


@pytest.mark.parametrize("bad", [[], "admin", None, ["root"], ["call", 7], [["call"]]])
def test_scopes_that_do_not_exist_are_refused(bad: object) -> None:
    with pytest.raises(Invalid):
        parse_scopes(bad)


def test_scopes_are_read_by_their_names() -> None:
    assert parse_scopes(["call", "viewer"]) == {Scope.CALL, Scope.VIEWER}
