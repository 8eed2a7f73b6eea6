"""What is remembered of keys and users while the database is away."""

from __future__ import annotations

import pytest

from gateway.access.memory import FRESH_S, KEEP_S, MAX_ROWS, RETRY_S, Memory
from gateway.errors import StoreUnavailable


class Store:
    """Rows behind a switch; counts how often it was asked."""

    def __init__(self) -> None:
        self.rows: dict[str, str] = {"a": "row"}
        self.is_away = False
        self.asked = 0

    def find(self, memory: Memory[str], key: str, now: float) -> str | None:
        def read() -> str | None:
            self.asked += 1
            if self.is_away:
                raise StoreUnavailable("away")
            return self.rows.get(key)

        return memory.find(key, read, now)


@pytest.fixture
def store() -> Store:
    return Store()


@pytest.fixture
def memory() -> Memory[str]:
    return Memory("rows")


def test_a_row_is_read_once_while_it_is_fresh(store: Store, memory: Memory[str]) -> None:
    for now in (0.0, 1.0, FRESH_S - 0.01):
        assert store.find(memory, "a", now) == "row"

    assert store.asked == 1


def test_a_change_elsewhere_is_seen_when_the_row_is_no_longer_fresh(
    store: Store, memory: Memory[str]
) -> None:
    store.find(memory, "a", 0.0)
    store.rows["a"] = "changed"

    assert store.find(memory, "a", FRESH_S) == "changed"


def test_a_row_that_is_gone_is_not_remembered(store: Store, memory: Memory[str]) -> None:
    store.find(memory, "a", 0.0)
    del store.rows["a"]

    assert store.find(memory, "a", FRESH_S) is None
    store.is_away = True
    with pytest.raises(StoreUnavailable):
        store.find(memory, "a", FRESH_S + 1)


def test_keys_that_do_not_exist_take_no_room(store: Store, memory: Memory[str]) -> None:
    store.find(memory, "a", 0.0)
    for number in range(MAX_ROWS + 10):
        assert store.find(memory, f"made up {number}", 1.0) is None

    store.is_away = True

    assert store.find(memory, "a", 10.0) == "row"


def test_the_last_known_row_serves_while_the_database_is_away(
    store: Store, memory: Memory[str]
) -> None:
    store.find(memory, "a", 0.0)
    store.is_away = True

    assert store.find(memory, "a", 100.0) == "row"


def test_a_dead_database_is_tried_once_in_a_while_and_not_by_each_request(
    store: Store, memory: Memory[str]
) -> None:
    store.find(memory, "a", 0.0)
    store.is_away = True
    asked = store.asked

    for now in (10.0, 10.1, 10.0 + RETRY_S - 0.01):
        store.find(memory, "a", now)

    assert store.asked == asked + 1
    store.find(memory, "a", 10.0 + RETRY_S)
    assert store.asked == asked + 2


def test_one_that_was_never_seen_cannot_be_known_without_the_database(
    store: Store, memory: Memory[str]
) -> None:
    store.is_away = True

    with pytest.raises(StoreUnavailable) as first:
        store.find(memory, "a", 0.0)
    with pytest.raises(StoreUnavailable):
        store.find(memory, "a", 0.1)

    assert first.value.retry_after_s == RETRY_S
    assert store.asked == 1


def test_a_row_that_was_not_confirmed_for_a_day_serves_no_more(
    store: Store, memory: Memory[str]
) -> None:
    store.find(memory, "a", 0.0)
    store.is_away = True

    assert store.find(memory, "a", KEEP_S) == "row"
    with pytest.raises(StoreUnavailable):
        store.find(memory, "a", KEEP_S + 1)


def test_the_database_counts_again_when_it_is_back(store: Store, memory: Memory[str]) -> None:
    store.find(memory, "a", 0.0)
    store.is_away = True
    store.find(memory, "a", 10.0)
    store.is_away = False
    store.rows["a"] = "changed"

    assert store.find(memory, "a", 10.0 + RETRY_S) == "changed"
    store.rows["a"] = "again"
    assert store.find(memory, "a", 10.0 + RETRY_S + FRESH_S) == "again"


def test_an_amended_row_gets_no_fresher(store: Store, memory: Memory[str]) -> None:
    store.find(memory, "a", 0.0)
    memory.amend("a", "noted")
    memory.amend("b", "never read")

    assert store.find(memory, "a", FRESH_S - 0.01) == "noted"
    assert store.find(memory, "a", FRESH_S) == "row"
    assert store.find(memory, "b", 0.0) is None


def test_a_forgotten_row_is_read_again_at_once(store: Store, memory: Memory[str]) -> None:
    store.find(memory, "a", 0.0)
    store.rows["a"] = "revoked"
    memory.forget("a")

    assert store.find(memory, "a", 0.1) == "revoked"


def test_the_rows_used_longest_ago_make_room(store: Store, memory: Memory[str]) -> None:
    for number in range(MAX_ROWS + 1):
        memory.put(str(number), "row", 0.0)
    store.is_away = True

    with pytest.raises(StoreUnavailable):
        store.find(memory, "0", 1.0)
    assert store.find(memory, "1", 1.0) == "row"
