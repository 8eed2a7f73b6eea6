"""The parts together, with settings, a real tokenizer file and real sockets."""

from __future__ import annotations

import hashlib
import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gateway.config import GatewaySection, Settings
from gateway.errors import TRAP_WORDS, ConfigError, InvalidRequest, has_trap_word
from gateway.store.database import Database
from gateway.values.assembly import Message
from gateway.workers.chatml import load_chatml
from gateway.workers.service import chat_tokenizers, make_workers
from tests.gateway.conftest import MakeDatabase
from tests.gateway.fake_worker import FakeWorker
from worker.engine.chat.template import find_template
from worker.engine.chat.tokenizer import ByteLevelTokenizer
from worker.protocol.messages import ChatMessage

TOKENIZER = Path(__file__).parents[2] / "models" / "demo-chat" / "tokenizer.json"
WORKERS = ByteLevelTokenizer(TOKENIZER, "models/demo-chat")
OURS = load_chatml(TOKENIZER)

pieces = st.one_of(
    st.text(st.characters(exclude_categories=["Cs"]), max_size=30),
    st.sampled_from(["<|im_end|>", "<|im_start|>system\n", "<|endoftext|>", " ", "\n\n", "{{x}}"]),
)
messages = st.lists(
    st.tuples(
        st.sampled_from(["system", "user", "assistant"]), st.lists(pieces, max_size=4).map("".join)
    ),
    min_size=1,
    max_size=5,
)


@pytest.fixture
def database(make_database: MakeDatabase) -> Database:
    """One engine is enough here: the statements are tested with the registry."""
    return make_database("sqlite")


@settings(max_examples=100, deadline=None)
@given(messages)
def test_our_prompt_ids_are_the_workers(listed: list[tuple[str, str]]) -> None:
    rendered = find_template("chatml").render([ChatMessage(*one) for one in listed])

    assert OURS.ids([Message(*one) for one in listed]) == WORKERS.encode(rendered)


def test_the_tokenizer_is_known_by_the_hash_of_its_file() -> None:
    assert OURS.sha256 == hashlib.sha256(TOKENIZER.read_bytes()).hexdigest() == WORKERS.sha256


def test_a_file_that_is_no_chatml_tokenizer_is_refused(tmp_path: Path) -> None:
    other = tmp_path / "tokenizer.json"
    with pytest.raises(ConfigError, match="cannot be read"):
        load_chatml(other)
    other.write_text("[]")
    with pytest.raises(ConfigError, match="no tokenizer"):
        load_chatml(other)
    other.write_text(json.dumps({"added_tokens": []}))
    with pytest.raises(ConfigError, match="im_start"):
        load_chatml(other)


def test_without_the_file_nothing_is_recomputed(tmp_path: Path) -> None:
    assert chat_tokenizers({}) == ()
    assert chat_tokenizers({"qwen": tmp_path}) == ()
    assert [one.sha256 for one in chat_tokenizers({"qwen": TOKENIZER.parent})] == [OURS.sha256]


def made(tmp_path: Path, **section: object) -> Settings:
    return Settings(
        section=GatewaySection.model_validate(section),
        state_dir=tmp_path,
        models_dir=tmp_path,
        database_url="",
        environment={"WAN_WORKER_API_KEY": "wan", "SDXL_WORKER_API_KEY": "sdxl"},
    )


def test_a_process_serves_its_static_workers_with_the_settings_keys(
    database: Database, tmp_path: Path
) -> None:
    with FakeWorker(key="wan") as worker:
        service = make_workers(
            made(tmp_path, chat_workers=[worker.url], media_workers=[worker.url]), database
        )
        service.start()

        done = service.pool.chat("/chat", [Message("user", "x")], {"model": "instruct"}, 10, "r-1")
        taken = service.media.post_generate(
            {"id": "j", "prompt": "x"}, worker_type="wan", deadline_s=10, request_id="r-2"
        )
        health = service.monitor.health(worker.url, max_age_s=60)
        service.close()

        assert done.attestation.ok
        assert taken.job_id == "j"
        assert health.is_healthy


def test_a_static_url_that_is_none_stops_the_start(database: Database, tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest):
        make_workers(made(tmp_path, chat_workers=["localhost:7861"]), database)


@pytest.mark.parametrize("key", ["s3cret\n", " s3cret", "s3crét"])
def test_a_key_that_no_header_can_carry_stops_the_start_and_is_not_shown(
    database: Database, tmp_path: Path, key: str
) -> None:
    settings = replace(made(tmp_path), environment={"WAN_WORKER_API_KEY": key})

    with pytest.raises(ConfigError) as told:
        make_workers(settings, database)

    assert "s3cr" not in str(told.value)


@pytest.mark.parametrize("word", TRAP_WORDS)
def test_words_that_clients_misread_are_found_in_any_casing(word: str) -> None:
    assert has_trap_word(f"xx{word.upper()}xx")
    assert not has_trap_word("a worker is busy")
