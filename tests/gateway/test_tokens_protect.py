"""gateway/tokens/protect.py: what shortening must keep is found by its place."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tokens.graphemes import is_boundary
from gateway.tokens.protect import Span, find_spans, locate, protected_spans


@pytest.mark.parametrize(
    ("text", "found"),
    [
        ("a cat <lora:add_detail:0.8>, soft", ("<lora:add_detail:0.8>",)),
        ("<LoRA:x:1><lyco:y-v1.5:-0.25>", ("<LoRA:x:1>", "<lyco:y-v1.5:-0.25>")),
        ("a <b> and 1 < 2 > 0", ()),
        ("a (red scarf:1.3), cat", ("(red scarf:1.3)",)),
        ("(a, b: -.5 ) c", ("(a, b: -.5 )",)),
        ("((glow)) and (an aside)", ("((glow))",)),
        ("((deep:1.2), other:0.9)", ("((deep:1.2), other:0.9)", "(deep:1.2)")),
        ("(red scarf)1.3, (fog)++, (mist)-", ("(red scarf)1.3", "(fog)++", "(mist)-")),
        ('("cat", "dog").blend(1, 2)', ('("cat", "dog").blend(1, 2)', '"cat"', '"dog"')),
        ("neon++ fog-- low-key, C", ("neon++", "fog--")),
        (r"a \(plain\) (b \):1.2)", (r"(b \):1.2)",)),
        ("not closed (a:1.3, b", ()),
        ('a sign "OPEN 24 HOURS" glows', ('"OPEN 24 HOURS"',)),
        ("“Café”, „Bar“, «Rue», ‹X›, 「出口」", ("“Café”", "„Bar“", "«Rue»", "‹X›", "「出口」")),
        ("a sign 'OPEN', the dogs' and cats' don't", ("'OPEN'",)),
        ("‘the dog’s bowl’ is the dog’s", ("‘the dog’s bowl’",)),
        ("a 5\" nail and a 7\" nail", ()),
        ("a 6'2 man, 7'1 woman", ()),
        ("看板\"開店\"と", ('"開店"',)),
        ('say "a\nb" now', ()),
        ("{{ style }} of {{prompt}} {x}", ("{{ style }}", "{{prompt}}")),
    ],
)  # fmt: skip
def test_forms_are_found(text: str, found: tuple[str, ...]) -> None:
    assert protected_spans(text) == found


@pytest.mark.parametrize(
    ("text", "names", "found"),
    [
        ("Ann at her anniversary, ANN", ("Ann",), ("Ann", "ANN")),
        ("Maya  Lindqvist smiles", ("maya lindqvist",), ("Maya  Lindqvist",)),
        ("Jose\u0301 and José", ("José",), ("Jose\u0301", "José")),
        ("Jose\u0301 alone", ("Jose",), ()),
        ("少女美咲が笑う", ("美咲",), ("美咲",)),
        ("Ann's cat, _Ann, Ann2", ("Ann",), ("Ann",)),
        ("Маша и машина", ("Маша",), ("Маша",)),
        ("ohwx woman, ohwxwoman", ("ohwx woman", "", "  "), ("ohwx woman",)),
        ("a.c and abc", ("a.c",), ("a.c",)),
    ],
)
def test_names_are_found_as_whole_words(
    text: str, names: tuple[str, ...], found: tuple[str, ...]
) -> None:
    assert protected_spans(text, names) == found


def test_a_name_within_a_quotation_is_found_by_itself_too() -> None:
    assert protected_spans('the sign "Maya"', ["Maya"]) == ('"Maya"', "Maya")


def test_nested_and_overlapping_places_are_one() -> None:
    text = 'a ("red" scarf:1.2) b'

    assert locate(text, ('("red" scarf:1.2)', '"red"', "scarf")) == (Span(2, 19),)
    assert locate("one two three", ("one two", "two three")) == (Span(0, 13),)
    assert locate("aa bb", ("aa", "bb")) == (Span(0, 2), Span(3, 5))


words = st.sampled_from(
    [
        *("a", " ", ",", "(", ")", ":1.2", '"', "“", "”", "'", "‘", "’", "\\", "\n", "++"),
        *("<lora:x:1>", "{{a}}", "Maya", "José", "美咲", "\u0301", "👍🏽"),
    ]
)


@settings(max_examples=250, deadline=None)
@given(st.lists(words, max_size=25).map("".join))
def test_places_are_within_the_text_and_located_again(text: str) -> None:
    names = ("Maya", "José", "美咲")

    spans = find_spans(text, names)

    assert all(0 <= one.start < one.end <= len(text) for one in spans)
    assert list(spans) == sorted(spans, key=lambda one: (one.start, -one.end))
    for one in locate(text, names):
        assert is_boundary(text, one.end)
    merged = locate(text, names)
    assert all(a.end <= b.start for a, b in itertools.pairwise(merged))
