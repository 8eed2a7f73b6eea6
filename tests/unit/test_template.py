"""Messages to ids: ChatML as its definition says it, and not one token more."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from tests.unit.test_tokenizer import (
    END,
    END_OF_TEXT,
    START,
    TEXTS,
    TOOL_CALL,
    Reference,
    write_tokenizer,
)
from worker.catalog import CHAT_TEMPLATES
from worker.engine.chat.template import TEMPLATES, Control, Text, find_template, plain_text
from worker.engine.chat.tokenizer import ByteLevelTokenizer
from worker.errors import ConfigError
from worker.protocol.messages import ChatMessage

# A busy machine is no reason to fail.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

CHATML = find_template("chatml")


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_tokenizer(tmp_path_factory.mktemp("qwen2") / "tokenizer.json")


@pytest.fixture(scope="module")
def tokenizer(path: Path) -> ByteLevelTokenizer:
    return ByteLevelTokenizer(path, "models/qwen2")


@pytest.fixture(scope="module")
def reference(path: Path) -> Reference:
    return Reference(path)


ROLES = st.sampled_from(["system", "user", "assistant"])
MESSAGES = st.lists(st.builds(ChatMessage, ROLES, TEXTS), min_size=1, max_size=4)


@settings(max_examples=2000, **PATIENT)
@given(messages=MESSAGES)
def test_the_ids_of_messages_are_those_of_chatml_by_definition(
    tokenizer: ByteLevelTokenizer, reference: Reference, messages: list[ChatMessage]
) -> None:
    ids = tokenizer.encode(CHATML.render(messages))

    expected: list[int] = []
    for message in messages:
        expected.append(reference.added[START])
        expected += reference.encode(message.role + "\n" + message.content)
        expected.append(reference.added[END])
        expected += reference.encode("\n")
    expected.append(reference.added[START])
    expected += reference.encode("assistant\n")
    assert ids == expected


@settings(max_examples=300, **PATIENT)
@given(messages=MESSAGES)
def test_no_content_can_make_a_control_token(
    tokenizer: ByteLevelTokenizer, reference: Reference, messages: list[ChatMessage]
) -> None:
    ids = tokenizer.encode(CHATML.render(messages))

    counts = {text: ids.count(number) for text, number in reference.added.items()}
    assert counts == {
        START: len(messages) + 1,
        END: len(messages),
        END_OF_TEXT: 0,
        TOOL_CALL: 0,
    }


def test_nothing_is_said_that_no_message_says() -> None:
    text = plain_text(CHATML.render([ChatMessage("user", "a red cube")]))

    assert text == "<|im_start|>user\na red cube<|im_end|>\n<|im_start|>assistant\n"


@pytest.mark.parametrize("content", ["", " ", "\n", "  padded \n\n", "\x00", "\ufeff"])
def test_contents_are_neither_stripped_nor_dropped(content: str) -> None:
    text = plain_text(CHATML.render([ChatMessage("system", content)]))

    assert text == f"<|im_start|>system\n{content}<|im_end|>\n<|im_start|>assistant\n"


def test_messages_of_one_role_in_a_row_stay_apart() -> None:
    pieces = CHATML.render([ChatMessage("user", "one"), ChatMessage("user", "two")])

    assert pieces == [
        Control("<|im_start|>"),
        Text("user\none"),
        Control("<|im_end|>"),
        Text("\n"),
        Control("<|im_start|>"),
        Text("user\ntwo"),
        Control("<|im_end|>"),
        Text("\n"),
        Control("<|im_start|>"),
        Text("assistant\n"),
    ]


def test_messages_stay_in_their_order_wherever_the_system_stands() -> None:
    messages = [ChatMessage("assistant", "a"), ChatMessage("system", "s"), ChatMessage("user", "u")]

    text = plain_text(CHATML.render(messages))

    assert text.index("assistant\na") < text.index("system\ns") < text.index("user\nu")


def test_messages_may_come_from_an_iterator() -> None:
    messages = [ChatMessage("user", "one")]

    assert CHATML.render(iter(messages)) == CHATML.render(messages)


@pytest.mark.parametrize("name", TEMPLATES)
def test_a_template_needs_every_control_token_that_it_writes(name: str) -> None:
    template = find_template(name)

    pieces = template.render([ChatMessage(role, "x") for role in ("system", "user", "assistant")])

    written = {piece.text for piece in pieces if isinstance(piece, Control)}
    assert written | {template.end} <= set(template.controls)


def test_an_unknown_template_is_refused_with_the_known_ones() -> None:
    with pytest.raises(ConfigError, match="chat_template alpaca is unknown; known: chatml"):
        find_template("alpaca")


def test_the_catalog_knows_the_same_templates() -> None:
    assert set(CHAT_TEMPLATES) == set(TEMPLATES)
