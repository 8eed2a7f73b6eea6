"""gateway/tokens/graphemes.py: a boundary is one of Unicode's, never inside a seen character."""

from __future__ import annotations

import pytest
import regex
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.tokens.graphemes import boundary_before, is_boundary

PARTS = [
    *("a", "é", "e\u0301", "\u0301", "1", " ", "\r", "\n", "雨", "ำ", "ｶ", "ﾞ", "\u0600"),
    *("👩", "\u200d", "👍", "🏽", "🇸", "🇪", "\ufe0f", "\U000e0067"),
    *("क", "\u094d", "ष", "각", "ᄀ", "ᅡ", "ᆨ"),
]


def boundaries(text: str) -> set[int]:
    return {match.end() for match in regex.finditer(r"\X", text)} | {0}


@settings(max_examples=400, deadline=None)
@given(st.lists(st.sampled_from(PARTS), max_size=12).map("".join) | st.text(max_size=20))
def test_every_boundary_is_one_of_unicodes(text: str) -> None:
    own = {at for at in range(len(text) + 1) if is_boundary(text, at)}

    assert own <= boundaries(text)


@pytest.mark.parametrize(
    "text",
    [
        "plain words, 1.5",
        "雨の中の少女",
        "👩‍👩‍👧‍👦🇸🇪🇯🇵👍🏽x",
        "cafe\u0301 né",
        "비 오는 거리",
        "\r\na\n",
    ],
)
def test_ordinary_texts_have_all_boundaries_of_unicode(text: str) -> None:
    own = {at for at in range(len(text) + 1) if is_boundary(text, at)}

    assert own == boundaries(text)


def test_the_boundary_before_a_place_is_the_nearest() -> None:
    assert boundary_before("a👍🏽b", 2) == 1
    assert boundary_before("a👍🏽b", 3) == 3
    assert boundary_before("\u0301" * 500, 400) == 0
    assert boundary_before("abc", 99) == 3
