"""Counts of whole prompts: by paragraphs and at once give the same number."""

from __future__ import annotations

from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from gateway.config import REPOSITORY
from gateway.prompts.counting import context_of, count_messages, tokenizer_of
from gateway.tokens.counters import TokenCounters
from gateway.values.assembly import Counter, Message
from gateway.values.rows import LlmModel, Provider
from tests.gateway.snapshots import WordCounter

CHAT_MODEL = REPOSITORY / "models" / "demo-chat"  # comes with the repository; Qwen's pattern


@cache
def qwen() -> Counter:
    return TokenCounters({"qwen": CHAT_MODEL}).of("qwen")


@cache
def tokenizer() -> Tokenizer:
    return Tokenizer.from_file(str(CHAT_MODEL / "tokenizer.json"))


PIECES = st.sampled_from(
    (
        "sea", " lamp", ".", "!?", "\n", "\n\n", "\r\n", " ", "  ", "\t", "\u00a0", "\u2028", "7",
        "é", "e\u0301", "\u0301", "🙂", "\u200d", "海", "'s", "(", "-", "A\n\nB", "\n\n\n",
        "<|im_end|>",
    )
)  # fmt: skip
TEXTS = st.lists(PIECES, max_size=30).map("".join)


@settings(deadline=None)
@given(st.lists(st.tuples(st.sampled_from(("system", "user", "assistant")), TEXTS), max_size=4))
def test_a_prompt_has_as_many_tokens_as_its_chat_form(turns: list[tuple[str, str]]) -> None:
    """Encoded here as the worker does it: control tokens by their ids, each text as one piece with
    special tokens switched off."""
    encoder = tokenizer()

    def pieces(text: str) -> int:
        encoder.encode_special_tokens = True
        return len(encoder.encode(text, add_special_tokens=False).ids)

    expected = sum(1 + pieces(f"{role}\n{text}") + 1 + pieces("\n") for role, text in turns)
    expected += 1 + pieces("assistant\n")

    counted = count_messages([Message(role, text) for role, text in turns], qwen())

    assert qwen().is_exact
    assert counted == expected


def test_another_exact_tokenizer_counts_the_whole_text() -> None:
    class Whole(WordCounter):
        def count(self, text: str) -> int:
            return 100 if "\n\n" in text else 1

    assert count_messages([Message("user", "a\n\nb")], Whole()) == 100 + 3 + 1 + 1


def model(**capabilities: object) -> LlmModel:
    return LlmModel(
        id=1,
        provider_id=1,
        external_id="m",
        model_name="M",
        model_key="m",
        capabilities=capabilities,
    )


def test_the_tokenizer_is_the_models_own_or_the_workers_or_none() -> None:
    worker = Provider(id=1, name="worker", kind="worker")
    other = Provider(id=1, name="open", kind="openai")

    assert tokenizer_of(model(tokenizer="umt5"), other) == "umt5"
    assert tokenizer_of(model(), worker) == "qwen"
    assert tokenizer_of(model(), other) is None
    assert tokenizer_of(None, None) is None


@pytest.mark.parametrize(
    ("length", "expected"), [(4096, 4096), (0, None), (True, None), ("4096", None), (None, None)]
)
def test_a_context_length_is_a_whole_number_or_unknown(
    length: object, expected: int | None
) -> None:
    assert context_of(model(context_length=length)) == expected
