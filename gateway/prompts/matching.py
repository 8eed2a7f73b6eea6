"""Which rules a request takes, in which order.

A rule is taken if all of its `match` holds, and, where it has tags, if the request or the character
has one of them. Order: priority, lowest first, then id.

What a rule says of the tuple (target, job, use, mode) is worked out once for a snapshot and a
tuple, since it is the same for every request of that tuple; the rest is looked at each time.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from typing import Any

from gateway.values.assembly import AssembleRequest, Step
from gateway.values.rows import ANY, Character, Rule, Snapshot

# In the order in which they are looked at; the first that differs is the reason that is told.
TUPLE_KEYS = ("target_model", "job_type", "use_case", "content_mode")
OTHER_KEYS = ("quality", "character_id", "user_tier")

KEPT_SNAPSHOTS = 4  # the one in use, and those that requests which began earlier still hold
KEPT_TUPLES = 256  # of a snapshot; a target may be any name that a caller sends

_Tuple4 = tuple[str | None, ...]


@dataclass(frozen=True, slots=True)
class Facts:
    """What rules are matched against. A character that is withheld is not among them."""

    values: Mapping[str, str | None]
    tags: frozenset[str]


@dataclass(frozen=True, slots=True)
class _Open:
    """A rule whose tuple matches, with what is left to look at."""

    rule: Rule
    left: tuple[tuple[str, Any], ...]


@dataclass(frozen=True, slots=True)
class _OfTuple:
    rules: tuple[_Open, ...]  # in order
    others: Mapping[str, tuple[int, ...]]  # ids by reason


def facts_of(request: AssembleRequest, content_mode: str, character: Character | None) -> Facts:
    """character: None also where it is withheld."""
    values = {
        "target_model": request.target_model,
        "job_type": request.job_type,
        "use_case": request.use_case,
        "content_mode": content_mode,
        "quality": request.quality,
        "character_id": None if character is None else character.id,
        "user_tier": request.user_tier,
    }
    tags = frozenset(request.tags)
    return Facts(values, tags if character is None else tags.union(character.tags))


def matching(snapshot: Snapshot, facts: Facts) -> tuple[tuple[Rule, ...], Step]:
    """Active rules that match, in order, and a step that has the ids of all others by reason."""
    of_tuple = _indexes().of(snapshot, tuple(facts.values[key] for key in TUPLE_KEYS))
    found: list[Rule] = []
    others: dict[str, list[int]] = {}
    for one in of_tuple.rules:
        reason = _differs(one.left, facts.values)
        if reason is None and one.rule.tags and facts.tags.isdisjoint(one.rule.tags):
            reason = "tags"
        if reason is None:
            found.append(one.rule)
        else:
            others.setdefault(reason, []).append(one.rule.id)
    step = Step(
        step="rule",
        outcome="unmatched",
        why=f"{len(found)} of {len(snapshot.rules)} rules match; the others by what differs first",
        detail={**of_tuple.others, **{reason: tuple(ids) for reason, ids in others.items()}},
    )
    return tuple(found), step


class Indexes:
    """The rules of the last few snapshots by tuple. Any thread reads; `_lock` guards every change,
    and what is read is replaced, never changed, except the tables of one snapshot, where a lost
    entry is made again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        # By identity: a snapshot is immutable, and comparing two costs more than this saves.
        self._kept: tuple[tuple[Snapshot, dict[_Tuple4, _OfTuple]], ...] = ()

    def of(self, snapshot: Snapshot, tuple4: _Tuple4) -> _OfTuple:
        table = self._table(snapshot)
        found = table.get(tuple4)
        if found is None:
            found = _of_tuple(snapshot, tuple4)
            with self._lock:
                if len(table) >= KEPT_TUPLES:
                    table.clear()
                table[tuple4] = found
        return found

    def _table(self, snapshot: Snapshot) -> dict[_Tuple4, _OfTuple]:
        for kept, table in self._kept:
            if kept is snapshot:
                return table
        made: dict[_Tuple4, _OfTuple] = {}
        with self._lock:
            self._kept = ((snapshot, made), *self._kept[: KEPT_SNAPSHOTS - 1])
        return made


@cache
def _indexes() -> Indexes:
    """The process's own."""
    return Indexes()


def _of_tuple(snapshot: Snapshot, tuple4: _Tuple4) -> _OfTuple:
    values = dict(zip(TUPLE_KEYS, tuple4, strict=True))
    rules: list[_Open] = []
    others: dict[str, list[int]] = {}
    for rule in snapshot.rules:
        # A key that is not known, from a newer program or a typing error, must not make the rule
        # apply to everything.
        unknown = [key for key in rule.match if key not in (*TUPLE_KEYS, *OTHER_KEYS)]
        fixed = tuple((key, rule.match[key]) for key in TUPLE_KEYS if key in rule.match)
        if not rule.is_active:
            reason: str | None = "is_active"
        elif unknown:
            reason = f"unknown key {unknown[0]}"
        else:
            reason = _differs(fixed, values)
        if reason is None:
            left = tuple((key, rule.match[key]) for key in OTHER_KEYS if key in rule.match)
            rules.append(_Open(rule, left))
        else:
            others.setdefault(reason, []).append(rule.id)
    rules.sort(key=lambda one: (one.rule.priority, one.rule.id))
    return _OfTuple(tuple(rules), {reason: tuple(ids) for reason, ids in others.items()})


def _differs(wanted: tuple[tuple[str, Any], ...], values: Mapping[str, str | None]) -> str | None:
    """The first key whose value is none of those that are wanted."""
    for key, one in wanted:
        value = values[key]
        if isinstance(one, str):
            if one != value and one != ANY:
                return key
        elif not isinstance(one, list | tuple) or (value not in one and ANY not in one):
            return key
    return None
