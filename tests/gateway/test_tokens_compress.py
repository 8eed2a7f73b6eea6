"""gateway/tokens/compress.py: under the limit, with all that is protected, or told that not."""

from __future__ import annotations

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from check_token_counts import NAMES, texts
from gateway.errors import TooLarge
from gateway.tokens.clauses import split
from gateway.tokens.compress import (
    TokenLimits,
    compress,
    cut_hard,
    limit_of,
    needs_second_pass,
    trim_by_clause,
)
from gateway.tokens.counters import TokenCounters
from gateway.tokens.estimate import EstimateCounter
from gateway.tokens.protect import locate, protected_spans
from gateway.values.assembly import Counter, Limits

MODELS = Path(__file__).resolve().parents[2] / "models"
COUNTERS = TokenCounters({"clip": MODELS / "demo-image", "umt5": MODELS / "demo-video"})
NAMED = ("clip", "umt5", "estimate")


class Words:
    """A token a word; joined signs count with their word."""

    name = "words"
    is_exact = True

    def count(self, text: str) -> int:
        return len(text.split())

    def cut(self, text: str, limit: int) -> str:
        while self.count(text) > limit:
            text = text[: text.rstrip().rfind(" ") + 1].rstrip()
        return text


def counter_of(name: str) -> Counter:
    return COUNTERS.of(name)


PIECES = st.sampled_from(
    [
        *("a red sofa", "soft window light", "in the rain", "extraordinarily detailed", "1,000"),
        *("雨の中の少女", "مرحبا", "👩‍👩‍👧‍👦", "e\u0301te\u0301", "\x00", "v1.5"),
        *(", ", ". ", "; ", "\n", "、", " ", "", "...", "!!"),
    ]
)
KEPT = st.sampled_from(
    [
        *("<lora:x:0.8>", "(red scarf:1.3)", "((glow))", "neon++", "{{style}}"),
        *('"OPEN, 24 H."', "“Café”", "Maya Lindqvist", "José", "美咲", "ohwx woman"),
    ]
)
prompts = st.lists(PIECES | PIECES | KEPT, max_size=40).map("".join)


@pytest.mark.parametrize("name", NAMED)
@settings(max_examples=150, deadline=None)
@given(text=prompts, limit=st.integers(0, 80))
def test_the_result_is_within_the_limit_with_every_protected_part(
    name: str, text: str, limit: int
) -> None:
    counter = counter_of(name)
    protected = protected_spans(text, NAMES)

    result = compress(text, limit=limit, counter=counter, protected=protected)

    assert all(part in result.text for part in protected)
    assert result.tokens == counter.count(result.text)
    assert result.fits is (result.tokens <= limit)
    if not result.fits:  # only where the protected parts alone are over the limit
        spans = [text[one.start : one.end] for one in locate(text, protected)]
        assert counter.count(" ".join(dict.fromkeys(spans))) > limit
    if counter.count(text) <= limit:
        assert (result.text, result.steps) == (text, ())


@pytest.mark.parametrize("name", ["clip", "umt5"])
def test_no_text_of_the_generator_is_over_and_no_part_is_lost(name: str) -> None:
    counter = counter_of(name)
    limit = 75
    over, lost, compressed = [], [], 0

    for text in texts(300, seed=5):
        protected = protected_spans(text, NAMES)
        result = compress(text, limit=limit, counter=counter, protected=protected)
        compressed += bool(result.steps)
        over += [text] if result.fits and counter.count(result.text) > limit else []
        lost += [part for part in protected if part not in result.text]

    assert compressed > 100
    assert (over, lost) == ([], [])


@settings(max_examples=150, deadline=None)
@given(text=st.text(max_size=120), limit=st.integers(0, 30), words=st.lists(st.text(max_size=6)))
def test_any_text_and_any_protected_words_keep_the_guarantee(
    text: str, limit: int, words: list[str]
) -> None:
    counter = EstimateCounter()
    there = [text[one.start : one.end] for one in locate(text, words)]

    result = compress(text, limit=limit, counter=counter, protected=words)

    assert all(part in result.text for part in there)
    assert result.fits is (counter.count(result.text) <= limit)


@settings(max_examples=150, deadline=None)
@given(text=prompts)
def test_clauses_together_are_the_text_and_no_separator_is_in_a_span(text: str) -> None:
    spans = locate(text, protected_spans(text, NAMES))

    clauses = split(text, spans)

    assert "".join(text[one.start : one.end] for one in clauses) == text
    assert tuple(span for one in clauses for span in one.spans) == spans
    for one in clauses:
        assert all(one.start <= span.start and span.end <= one.body_end for span in one.spans)


@pytest.mark.parametrize(
    ("text", "bodies"),
    [
        ("a cat, a dog; a bird. The end.", ["a cat", "a dog", "a bird", "The end."]),
        ("1girl,solo,8k", ["1girl", "solo", "8k"]),
        ("f/1.8, 1,000 lamps, v1.5", ["f/1.8", "1,000 lamps", "v1.5"]),
        ("東京タワー、夜景。雨", ["東京タワー", "夜景", "雨"]),
        ("مرحبا، بالعالم؛ دهو", ["مرحبا", "بالعالم", "دهو"]),
        (", , a cat\n\nb", [", , a cat", "b"]),
        ("no separator", ["no separator"]),
        ("", [""]),
    ],
)
def test_clauses_end_where_a_reader_ends_them(text: str, bodies: list[str]) -> None:
    assert [text[one.start : one.body_end] for one in split(text, ())] == bodies


def test_the_last_clause_goes_first_and_no_separator_is_left_at_the_end() -> None:
    text = "a red cat, on a sofa, in soft light, 85mm lens"

    results = [trim_by_clause(text, limit=n, counter=Words()).text for n in (10, 8, 6, 3)]

    assert results == [
        "a red cat, on a sofa, in soft light",
        "a red cat, on a sofa",
        "a red cat, on a sofa",
        "a red cat",
    ]


def test_a_sentence_keeps_its_end() -> None:
    text = "A cat sits. It is red. And so on."

    assert trim_by_clause(text, limit=6, counter=Words()).text == "A cat sits. It is red."


def test_a_clause_with_a_protected_part_is_trimmed_around_it() -> None:
    text = 'a red cat, long boring words, a sign that says "OPEN" in neon, soft light'

    result = trim_by_clause(text, limit=7, counter=Words(), protected=('"OPEN"',))

    assert result.text == 'a red cat, long boring words, "OPEN"'
    assert result.fits
    assert result.steps[0].outcome == "clauses_dropped"
    assert result.steps[0].detail == {
        "before": 15,
        "after": 7,
        "limit": 7,
        "clauses": 4,
        "dropped": 1,
        "reduced": 1,
        "characters": len(text) - len(result.text),
    }


def test_trimming_never_drops_the_first_clause_and_says_when_that_is_not_enough() -> None:
    result = trim_by_clause("one two three four, five", limit=2, counter=Words())

    assert (result.text, result.fits) == ("one two three four", False)


def test_a_cut_keeps_the_beginning_and_the_protected_parts_behind_it() -> None:
    text = "one two three four Maya five six <lora:x:1> seven"

    result = cut_hard(text, limit=4, counter=Words(), protected=("Maya", "<lora:x:1>"))

    assert result.text == "one two Maya <lora:x:1>"
    assert result.steps[-1].outcome == "cut"


def test_a_cut_ends_with_a_word_where_there_is_more_than_one() -> None:
    counter = counter_of("clip")
    text = "a red sofa " + "extraordinarily" * 30

    result = cut_hard(text, limit=20, counter=counter)

    assert result.text == "a red sofa"
    assert cut_hard("x" * 900, limit=20, counter=counter).tokens == 20


def test_repeated_parts_stay_once_where_all_of_them_would_not_fit() -> None:
    text = "Maya and Maya and Maya and <lora:x:1>"

    result = compress(text, limit=2, counter=Words(), protected=("Maya", "<lora:x:1>"))

    assert result.text == "Maya <lora:x:1>"
    assert result.fits
    assert [one.outcome for one in result.steps] == ["repeats_dropped", "cut"]


def test_the_caller_is_told_when_the_protected_parts_alone_are_over_the_limit() -> None:
    text = "a sign, “one two three”, Maya"

    result = compress(text, limit=3, counter=Words(), protected=("“one two three”", "Maya"))

    assert (result.text, result.tokens, result.fits) == ("“one two three” Maya", 4, False)
    assert result.steps[-1].outcome == "unfit"
    with pytest.raises(TooLarge, match="4 tokens and the limit is 3"):
        result.must_fit()


def test_a_text_within_the_limit_is_returned_byte_for_byte() -> None:
    text = "  a,\t b \r\n,, "

    result = compress(text, limit=4, counter=Words())

    assert result.text is text
    assert result.steps == ()
    assert result.must_fit() is result


def test_between_target_and_hard_limit_whole_clauses_are_kept() -> None:
    text = "one two three four five, six, seven"

    soft = compress(text, limit=3, counter=Words(), hard_limit=6)
    hard = compress(text, limit=3, counter=Words(), hard_limit=4)

    assert (soft.text, soft.fits, soft.limit) == ("one two three four five", True, 6)
    assert (hard.text, hard.fits) == ("one two three four", True)


def test_no_step_holds_text_of_the_prompt() -> None:
    text = "secretword one, secretword two, secretword three <lora:secretword:1>"

    result = compress(text, limit=2, counter=Words(), protected=("<lora:secretword:1>",))

    assert result.steps
    assert "secretword" not in repr(result.steps)


@pytest.mark.parametrize(
    ("target", "hard", "expected"),
    [
        (75, None, TokenLimits(target=75, hard=75)),
        (100, 512, TokenLimits(target=100, hard=512)),
        (600, 512, TokenLimits(target=512, hard=512)),
        (None, 512, TokenLimits(target=512, hard=512)),
        (None, None, None),
    ],
)
def test_limits_of_a_template(
    target: int | None, hard: int | None, expected: TokenLimits | None
) -> None:
    limits = Limits(
        max_output_tokens=160,
        target_token_limit=target,
        hard_token_limit=hard,
        target_tokenizer="clip",
    )

    assert limit_of(limits) == expected


@pytest.mark.parametrize(
    ("before", "after", "passes_left", "asks"),
    [
        (75, 75, 1, False),  # it fitted
        (140, 70, 1, False),  # trimmed well
        (140, 90, 1, True),  # still over
        (140, 37, 1, True),  # half of the room is empty
        (140, 38, 1, False),
        (140, 90, 0, False),  # nobody to ask
    ],
)
def test_the_model_is_asked_again_only_where_that_helps(
    before: int, after: int, passes_left: int, asks: bool
) -> None:
    assert needs_second_pass(before=before, after=after, limit=75, passes_left=passes_left) is asks
