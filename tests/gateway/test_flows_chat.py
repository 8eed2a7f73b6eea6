"""The playground's chat: history, ownership, and turns that are kept only with their answer."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from datetime import UTC, datetime, timedelta
from threading import Barrier
from typing import Any

import pytest
from sqlalchemy import func, select

from gateway.errors import Conflict, Forbidden, NotFound, PromptRefused, WorkerBusy
from gateway.flows.chat import HISTORY_TURNS, Chat, ChatInput
from gateway.store.conversations import append, turns
from gateway.store.database import Database
from gateway.store.tables import conversation_messages, conversations
from gateway.values.assembly import Message
from gateway.values.rows import Rule
from tests.gateway.flow_parts import (
    DARIO,
    MINOR,
    NOW,
    ORLA,
    OTHER,
    THEME,
    USER,
    FakeModels,
    FixedPrompts,
    KeptLog,
    Ticking,
    call,
    caller,
    resolve,
    shipped,
)

TALK = "11111111-1111-4111-8111-111111111111"


@dataclass
class ChatBench:
    database: Database
    models: FakeModels = field(default_factory=lambda: FakeModels(["Good evening."]))
    prompts: FixedPrompts = field(default_factory=FixedPrompts)
    log: KeptLog = field(default_factory=KeptLog)

    def say(self, message: str = "hello", by: Any = None, **fields: Any) -> dict[str, Any]:
        chat = Chat(
            self.prompts,
            resolve,
            self.models,
            self.database,
            self.log,
            Ticking(),
            lambda: NOW,
        )
        asked = ChatInput(conversation_id=TALK, message=message, **fields)
        return chat.say(asked, by or call(endpoint="playground-chat"))

    def kept(self) -> list[tuple[str, str]]:
        with self.database.reading() as connection:
            rows = connection.execute(
                select(conversation_messages.c.role, conversation_messages.c.content).order_by(
                    conversation_messages.c.id
                )
            )
            return [(row.role, row.content) for row in rows]


@pytest.fixture
def bench(database: Database) -> ChatBench:
    return ChatBench(database)


def test_a_first_turn_begins_the_conversation_and_is_answered(bench: ChatBench) -> None:
    body = bench.say(character_id=ORLA)

    assert body["success"] is True
    assert (body["response"], body["conversation_id"]) == ("Good evening.", TALK)
    assert set(body) >= {
        "generation_time",
        "context_type",
        "content_tier",
        "nsfw_enforce",
        "template_meta",
        "prompt_template_name",
        "enforcement_diagnostics",
        "model_provider",
        "model_used",
    }
    assert (body["content_tier"], body["nsfw_enforce"]) == ("sfw", False)
    assert body["generation_time"] == 5
    assert (body["prompt_template_name"], body["model_used"]) == (
        "playground_sfw",
        "qwen_instruct",
    )
    assert body["template_meta"]["origin"] == "template"
    json.dumps(body)
    assert bench.kept() == [("user", "hello"), ("assistant", "Good evening.")]
    with bench.database.reading() as connection:
        row = connection.execute(select(conversations)).mappings().one()
    assert (row["id"], row["user_id"], row["character_id"]) == (TALK, USER, ORLA)


def test_the_answer_is_the_models_byte_for_byte(bench: ChatBench) -> None:
    bench.models.replies = [" *smiles* 😀\n\n  Dear guest … \t"]

    assert bench.say()["response"] == " *smiles* 😀\n\n  Dear guest … \t"
    assert bench.kept()[1] == ("assistant", " *smiles* 😀\n\n  Dear guest … \t")


def test_earlier_turns_are_sent_oldest_first(bench: ChatBench) -> None:
    bench.models.replies = ["one", "two", "three"]

    for message in ("first", "second", "third"):
        bench.say(message)

    sent = bench.models.asked[-1].messages
    assert sent[0].role == "system"
    assert sent[1:] == (
        Message("user", "first"),
        Message("assistant", "one"),
        Message("user", "second"),
        Message("assistant", "two"),
        Message("user", "third"),
    )
    assert bench.models.asked[-1].route == "/chat"


def test_only_the_last_turns_are_sent(bench: ChatBench) -> None:
    for number in range(HISTORY_TURNS):
        bench.say(f"turn {number}")

    sent = bench.models.asked[-1].messages
    assert len(sent) == 1 + HISTORY_TURNS + 1
    assert sent[-1].content == f"turn {HISTORY_TURNS - 1}"
    assert sent[1].content == f"turn {HISTORY_TURNS - 1 - HISTORY_TURNS // 2}"


def test_another_users_conversation_is_not_found_and_stays_as_it_is(bench: ChatBench) -> None:
    bench.say("mine")
    before = bench.kept()

    with pytest.raises(NotFound):
        bench.say("theirs", call(caller(user_id=OTHER)))

    assert bench.kept() == before
    assert len(bench.models.asked) == 1
    assert bench.log.entries[-1].error_code == "not_found"


def test_a_caller_without_a_user_has_no_conversations(bench: ChatBench) -> None:
    with pytest.raises(Forbidden):
        bench.say(by=call(caller(user_id=None)))

    assert bench.models.asked == []


@pytest.mark.parametrize("error", [WorkerBusy("full"), KeyError("bug")])
def test_a_turn_that_failed_is_not_kept_and_may_be_sent_again(
    bench: ChatBench, error: Exception
) -> None:
    bench.models.replies = [error, "Good evening."]

    with pytest.raises(type(error)):
        bench.say("again")
    assert bench.kept() == []

    assert bench.say("again")["response"] == "Good evening."
    assert bench.models.asked[1].messages == bench.models.asked[0].messages
    assert len(bench.kept()) == 2


def test_the_callers_system_text_takes_the_templates_place_unrendered(bench: ChatBench) -> None:
    body = bench.say(system_override="Speak like {{ nobody }}.")

    assert bench.models.asked[0].messages[0].content.startswith("Speak like {{ nobody }}.")
    assert body["template_meta"]["origin"] == "override"


def test_tags_choose_rules(bench: ChatBench) -> None:
    rule = Rule(
        id=900,
        name="immersive",
        rule_type="append",
        slot="system",
        body="Write at length.",
        tags=("style:immersive",),
    )
    bench.prompts.snapshot = replace(shipped(), rules=(rule,))

    bench.say(tags=("style:immersive",))
    bench.say()

    with_tag, without_tag = (one.messages[0].content for one in bench.models.asked)
    assert "Write at length." in with_tag
    assert "Write at length." not in without_tag


def test_the_mode_follows_the_character_and_what_the_user_may_see(bench: ChatBench) -> None:
    allowed = bench.say(character_id=DARIO)
    refused = bench.say(character_id=DARIO, by=call(caller(may_use_nsfw=False)))

    assert (allowed["content_tier"], allowed["nsfw_enforce"]) == ("nsfw", True)
    assert (refused["content_tier"], refused["nsfw_enforce"]) == ("sfw", False)


@pytest.mark.parametrize(
    "fields",
    [
        {"message": f"{THEME}, {MINOR}"},
        {"message": THEME, "system_override": MINOR},
        {"message": THEME, "variables": {"participants": MINOR}},
    ],
)
def test_what_is_refused_is_not_kept(bench: ChatBench, fields: dict[str, Any]) -> None:
    with pytest.raises(PromptRefused) as caught:
        bench.say(**fields)

    assert MINOR not in str(caught.value)
    assert bench.models.asked == []
    assert bench.kept() == []


def test_a_refusal_sees_turns_before_it(bench: ChatBench) -> None:
    bench.say(MINOR)

    with pytest.raises(PromptRefused):
        bench.say(THEME)

    assert len(bench.kept()) == 2


@pytest.mark.parametrize(("message", "said"), [("hello", f"{THEME}, {MINOR}"), (MINOR, THEME)])
def test_a_refused_answer_is_not_kept(bench: ChatBench, message: str, said: str) -> None:
    bench.models.replies = [said]

    with pytest.raises(PromptRefused):
        bench.say(message)

    assert bench.kept() == []


def test_an_answer_is_refused_with_the_turns_that_it_answers(bench: ChatBench) -> None:
    bench.models.replies = ["Good evening.", THEME]
    bench.say(MINOR)

    with pytest.raises(PromptRefused):
        bench.say("go on")

    assert len(bench.kept()) == 2


def test_a_chat_is_logged_with_what_was_sent(bench: ChatBench) -> None:
    body = bench.say()

    (entry,) = bench.log.entries
    assert (entry.endpoint, entry.status, entry.user_id) == ("playground-chat", 200, USER)
    assert entry.messages_sha256 == body["trace"]["messages_sha256"]
    assert entry.body is not None
    assert entry.body.messages == bench.models.asked[0].messages


# --- the store ----------------------------------------------------------------------------------


def add(database: Database, user_id: str, said: str, at: datetime = NOW) -> None:
    with database.transaction() as connection:
        append(connection, TALK, user_id, None, said, "yes", "r-1", at)


def test_an_id_that_is_taken_is_a_conflict(database: Database) -> None:
    add(database, USER, "one")

    with pytest.raises(Conflict):
        add(database, OTHER, "two")

    with database.reading() as connection:
        assert len(turns(connection, TALK, USER, 10)) == 2
        assert connection.scalar(select(conversations.c.user_id)) == USER


def test_a_turn_moves_the_conversations_time(database: Database) -> None:
    add(database, USER, "one")
    add(database, USER, "two", NOW + timedelta(minutes=1))

    with database.reading() as connection:
        row = connection.execute(select(conversations)).mappings().one()
    created, updated = (_aware(row[name]) for name in ("created_at", "updated_at"))
    assert (created, updated) == (NOW, NOW + timedelta(minutes=1))


def test_two_first_turns_at_once_are_one_conversation(database: Database) -> None:
    together = Barrier(4)

    def send(number: int) -> None:
        together.wait()
        add(database, USER, f"turn {number}")

    with ThreadPoolExecutor(4) as pool:
        list(pool.map(send, range(4)))

    with database.reading() as connection:
        assert connection.scalar(select(func.count()).select_from(conversations)) == 1
        assert len(turns(connection, TALK, USER, 100)) == 8


def test_an_id_can_be_begun_by_one_of_two_users_only(database: Database) -> None:
    together = Barrier(2)

    def send(user_id: str) -> bool:
        together.wait()
        try:
            add(database, user_id, f"of {user_id}")
        except Conflict:
            return False
        return True

    with ThreadPoolExecutor(2) as pool:
        done = list(pool.map(send, (USER, OTHER)))

    assert sorted(done) == [False, True]


def _aware(at: datetime) -> datetime:
    return at if at.tzinfo else at.replace(tzinfo=UTC)
