"""Stop strings: the same answer wherever the borders between tokens fall."""

from __future__ import annotations

from collections.abc import Sequence

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from worker.engine.chat.stop import StopScanner


def run(chunks: Sequence[str], stops: Sequence[str]) -> tuple[str, str | None]:
    """All that is shown of a text that arrives in chunks, and the stop string that ended it."""
    scanner = StopScanner(stops)
    shown = [scanner.feed(chunk) for chunk in chunks]
    shown.append(scanner.finish())
    return "".join(shown), scanner.found


def on_the_whole(text: str, stops: Sequence[str]) -> tuple[str, str | None]:
    """The definition: the earliest beginning wins, of one beginning the stop given first."""
    for start in range(len(text)):
        for stop in stops:
            if text.startswith(stop, start):
                return text[:start], stop
    return text, None


# Few letters, so that stop strings overlap with the text, with each other and with themselves.
LETTERS = st.sampled_from("ab\n👍")
STOPS = st.lists(st.text(LETTERS, min_size=1, max_size=4), max_size=3)
CHUNKS = st.lists(st.text(LETTERS, max_size=4), max_size=8)


@settings(max_examples=3000, deadline=None)
@given(chunks=CHUNKS, stops=STOPS)
@example(chunks=["ab", "c"], stops=["abc", "ab"])
@example(chunks=["ab", "d"], stops=["abc", "ab"])
@example(chunks=["a", "b", "b"], stops=["abb", "bb", "ab"])
def test_borders_between_chunks_change_nothing(chunks: list[str], stops: list[str]) -> None:
    assert run(chunks, stops) == on_the_whole("".join(chunks), stops)


@settings(max_examples=1000, deadline=None)
@given(chunks=CHUNKS, stops=STOPS)
def test_what_is_shown_is_never_taken_back(chunks: list[str], stops: list[str]) -> None:
    final, _ = on_the_whole("".join(chunks), stops)
    scanner = StopScanner(stops)
    shown = ""

    for chunk in chunks:
        shown += scanner.feed(chunk)

        assert final.startswith(shown)


@settings(max_examples=1000, deadline=None)
@given(chunks=CHUNKS, stops=STOPS)
def test_no_more_is_held_back_than_could_become_a_stop_string(
    chunks: list[str], stops: list[str]
) -> None:
    scanner = StopScanner(stops)
    shown = "".join(scanner.feed(chunk) for chunk in chunks)
    text = "".join(chunks)

    held = text[len(shown) :]

    if scanner.found is None and held:
        assert any(stop.startswith(held) for stop in stops)


def test_a_stop_string_across_borders_is_found_and_not_shown() -> None:
    scanner = StopScanner(["\nUser:"])

    shown = [scanner.feed(chunk) for chunk in ["Hello", "\n", "Us", "er: more"]]

    assert shown == ["Hello", "", "", ""]
    assert scanner.found == "\nUser:"
    assert scanner.finish() == ""


def test_an_incomplete_stop_string_at_the_end_is_shown() -> None:
    scanner = StopScanner(["\nUser:"])

    shown = [scanner.feed("Hello\nUse"), scanner.finish()]

    assert shown == ["Hello", "\nUse"]
    assert scanner.found is None


def test_a_beginning_that_failed_is_shown_at_once() -> None:
    scanner = StopScanner(["###"])

    shown = [scanner.feed(chunk) for chunk in ["a#", "#", "b"]]

    assert shown == ["a", "", "##b"]


def test_the_stop_string_that_begins_first_wins_even_when_another_is_complete_first() -> None:
    scanner = StopScanner(["bc", "abcd"])

    shown = [scanner.feed(chunk) for chunk in ["xab", "c", "d"]]

    assert "".join(shown) == "x"
    assert scanner.found == "abcd"


def test_a_complete_later_stop_string_counts_when_the_earlier_beginning_fails() -> None:
    scanner = StopScanner(["bc", "abcd"])

    shown = [scanner.feed(chunk) for chunk in ["xab", "c", "e"]]

    assert "".join(shown) == "xa"
    assert scanner.found == "bc"


def test_a_complete_later_stop_string_counts_when_the_text_ends() -> None:
    assert run(["xab", "c"], ["bc", "abcd"]) == ("xa", "bc")


def test_a_stop_string_at_the_very_beginning_leaves_no_text() -> None:
    assert run(["##", "# more"], ["###"]) == ("", "###")


def test_nothing_after_a_stop_string_is_shown() -> None:
    scanner = StopScanner(["."])

    shown = [scanner.feed("One. Two"), scanner.feed(" and three"), scanner.finish()]

    assert shown == ["One", "", ""]


def test_without_stop_strings_every_text_passes_at_once() -> None:
    scanner = StopScanner([])

    assert [scanner.feed("a"), scanner.feed(""), scanner.feed("b")] == ["a", "", "b"]
    assert scanner.finish() == ""
    assert scanner.found is None


@pytest.mark.parametrize("stop", ["A", " a", "a\u0301", "<|im_end|>"])
def test_a_stop_string_is_compared_as_it_is(stop: str) -> None:
    text = "a <|im_end |> á"

    assert run([text], [stop]) == (on_the_whole(text, [stop]))
    assert run([text + stop], [stop])[1] == stop
