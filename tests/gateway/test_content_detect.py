"""The content detector, and its frozen prompts."""

from __future__ import annotations

import hashlib

import pytest
from hypothesis import given
from hypothesis import strategies as st

from evaluate_detector import (
    PARTS,
    PRECISION,
    PROMPTS,
    RECALL,
    read_prompts,
    score_detector,
)
from gateway.content.detect import adult_terms, detect
from gateway.content.spelling import MARK, masks, words
from gateway.content.terms import TermList
from gateway.errors import ConfigError

# Of the file as it was measured. Whoever changes a prompt changes what "0.99" means: give the file
# a new version, measure again, and say so.
VERSION, SHA256 = "Version 1", "cb9469c85899a84986bf7b916d92d47daa1b4b79d3318fc61c71cd2ee3db06c2"

# Strong words that no neighbour excuses.
PLAIN = sorted(adult_terms().strong - set(adult_terms().unless))


def test_the_frozen_prompts_are_those_that_were_measured() -> None:
    raw = PROMPTS.read_bytes()

    assert hashlib.sha256(raw).hexdigest() == SHA256
    assert VERSION in raw.decode().split("\n")[0]


def test_the_frozen_prompts_are_many_and_balanced_and_in_one_part_each() -> None:
    prompts = read_prompts()
    adult = sum(1 for one in prompts if one.label == "nsfw")

    assert len(prompts) >= 1200
    assert len({one.text for one in prompts}) == len(prompts)
    assert 0.4 <= adult / len(prompts) <= 0.6
    assert {one.label for one in prompts} == {"sfw", "nsfw"}
    assert {one.part for one in prompts} == set(PARTS)


@pytest.mark.parametrize("part", PARTS)
def test_recall_and_precision_are_at_their_goals(part: str) -> None:
    score, wrong = score_detector(read_prompts(), part)

    assert score.recall >= RECALL, wrong
    assert score.precision >= PRECISION, wrong


@pytest.mark.parametrize(
    "text",
    [
        "a class photo",
        "mountain pass",
        "a bass guitar",
        "nude lipstick",
        "nude matte lipstick",
        "adult education",
        "explicit instructions",
        "the naked eye",
        "sexual reproduction of plants",
        "a street in Essex",
        "Sussex downs",
        "cockpit of a jet",
        "Scunthorpe station",
        "breast cancer screening",
        "an intimate dinner",
        "a family portrait, no nudity",
        "",
    ],
)
def test_harmless_uses_are_sfw(text: str) -> None:
    assert detect(text).mode == "sfw"


@pytest.mark.parametrize(
    "text",
    [
        "a nude woman in a classic pose",
        "a nude in first class",
        "passionate nude couple with a bass guitar",
        "nude lipstick, the woman is naked",
        "naked on the rocks",
        "naked, eye contact",
        "explicit instructions for an erotic story",
    ],
)
def test_a_harmless_word_elsewhere_does_not_switch_a_match_off(text: str) -> None:
    assert detect(text).mode == "nsfw"


@given(
    word=st.sampled_from(PLAIN),
    before=st.sampled_from(("a class of", "classic bass,", "passion for", "the pass and a")),
    after=st.sampled_from((", classy", " in class", ". The bass plays", " and an adult education")),
)
def test_words_of_the_list_count_among_any_harmless_ones(
    word: str, before: str, after: str
) -> None:
    assert word in detect(f"{before} {word}{after}").terms


@given(
    word=st.sampled_from([one for one in PLAIN if len(one) >= 4 and one.isalpha()]),
    separator=st.sampled_from(("-", ".", "_", " ", "*", "\u200b", "\u00ad", "\u0301")),
)
def test_letters_that_are_spelled_apart_are_read_together(word: str, separator: str) -> None:
    assert detect(f"the {separator.join(word)}, please").mode == "nsfw"


@given(
    st.sampled_from(
        [one for one in PLAIN if len(one) >= 4 and one.isalpha() and set("aeios") & set(one)]
    )
)
def test_digits_for_letters_are_read_as_letters(word: str) -> None:
    spelled = word.translate(str.maketrans("aeios", "43105"))

    assert detect(f"the {spelled}, please").mode == "nsfw"


@given(st.sampled_from(PLAIN))
def test_other_forms_of_letters_are_the_same_letters(word: str) -> None:
    wide = "".join(chr(ord(one) + 0xFEE0) if "!" <= one <= "~" else one for one in word)

    assert detect(wide).mode == detect(word.upper()).mode == "nsfw"
    assert detect(word.replace("a", "а").replace("e", "е").replace("o", "о")).mode == "nsfw"


@given(st.text(max_size=200))
def test_any_text_is_judged_the_same_each_time(text: str) -> None:
    first = detect(text)

    assert first == detect(text)
    assert (first.mode == "nsfw") == bool(first.terms)


@given(st.text(alphabet="xqz0189 -.", max_size=60))
def test_terms_are_those_of_the_list_and_never_the_text(text: str) -> None:
    terms = adult_terms()
    listed = {*terms.strong, *terms.near, *terms.heads, "pattern"}

    assert set(detect(f"{text} nude {text}").terms) <= listed


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("4k 8k", ["4k", "8k"]),
        ("b2b mp3", ["b2b", "mp3"]),
        ("r2d2, c3po", ["r2d2", MARK, "c3po"]),
        ("a-b c_d", ["a", "b", "c", "d"]),
        ("1 2 3", ["1", "2", "3"]),
    ],
)
def test_signs_and_digits_that_hide_nothing_stay(text: str, expected: list[str]) -> None:
    assert words(text, frozenset({"nude"}), masks({"nude"})) == [*expected, MARK]


def test_a_list_with_an_exception_for_no_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="not in the list"):
        TermList({"strong": "a", "unless": {"b": {"after": "c"}}})


def test_a_list_with_an_unknown_key_beside_a_word_is_refused() -> None:
    with pytest.raises(ConfigError, match="takes before and after"):
        TermList({"near": {"b": {"afterwards": "c"}}})


def test_a_pattern_that_begins_with_a_word_that_may_be_missing_is_refused() -> None:
    with pytest.raises(ConfigError, match="may be missing"):
        TermList({"patterns": ["a? b"]})


def test_patterns_take_alternatives_missing_words_and_groups() -> None:
    terms = TermList({"patterns": ["a|b the? <end>"], "groups": {"end": "x y"}})

    assert terms.found(["b", "x"]) == terms.found(["a", "the", "y"]) == ("a|b the? <end>",)
    assert terms.found(["a", "the"]) == terms.found(["the", "x"]) == ()


def test_what_a_clean_row_covers_counts_for_nothing_and_the_rest_does() -> None:
    terms = TermList({"strong": "sex", "clean": ["sex and the city"]})

    assert terms.found("sex and the city".split()) == ()
    assert terms.found("sex and the city sex".split()) == ("sex",)
