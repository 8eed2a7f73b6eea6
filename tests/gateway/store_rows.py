"""A small configuration for tests of the store, and plain connections beside SQLAlchemy."""

from __future__ import annotations

import sqlite3
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import psycopg

from gateway.store.database import Database
from gateway.store.seed import seed
from gateway.values.rows import CharacterLora
from gateway.values.seeds import (
    SeedAssignment,
    SeedCharacter,
    SeedModel,
    SeedNegative,
    SeedParameters,
    SeedProvider,
    SeedRule,
    Seeds,
    SeedTemplate,
)


def template(name: str = "enhancement_sdxl_sfw", **values: Any) -> SeedTemplate:
    return SeedTemplate(
        **{
            "template_name": name,
            "target_model": "sdxl",
            "job_type": "image",
            "use_case": "enhancement",
            "content_mode": "sfw",
            "system_prompt": "Describe the picture.",
            "variables": ("mood",),
            "max_output_tokens": 160,
            "target_token_limit": 75,
            "target_tokenizer": "clip",
            "params": {"temperature": 0.7, "top_p": 1.0},
            **values,
        }
    )


SEEDS = Seeds(
    templates=(
        template(),
        template("old_template", content_mode="nsfw", system_prompt="Old — ältere Fassung 🙂"),
        template(
            "chat_sfw",
            target_model="qwen_instruct",
            job_type="chat",
            use_case="chat",
            max_output_tokens=200,
            target_token_limit=None,
            target_tokenizer=None,
        ),
    ),
    rules=(
        SeedRule(name="z_first", rule_type="append", slot="system", body="Be short."),
        SeedRule(
            name="a_second",
            rule_type="prepend",
            slot="user",
            body="Photo: ",
            match={"target_model": ["sdxl", "wan"], "quality": "high"},
            tags=("photo", "art"),
            max_tokens=20,
            is_optional=True,
        ),
    ),
    parameters=(
        SeedParameters(profile="fast", params={"temperature": 0.5}),
        SeedParameters(profile="high", params={"temperature": 1e-7, "max_tokens": 10**22}),
    ),
    characters=(
        SeedCharacter(
            id="demo-1",
            name="Demo",
            tags=("calm",),
            card={"character_goals": "rest"},
            loras=(CharacterLora(lora_ref="ink", weight=0.5, trigger_words=("ink",)),),
        ),
    ),
    negatives=(
        SeedNegative(target_model="sdxl", content_mode="sfw", negative_prompt="blurry"),
        SeedNegative(target_model="sdxl", content_mode="sfw", negative_prompt="artifacts"),
    ),
    providers=(
        SeedProvider(name="worker", kind="worker"),
        SeedProvider(
            name="openrouter",
            kind="openai",
            base_url="https://openrouter.ai/api/v1",
            secret_ref="OPENROUTER_API_KEY",
        ),
    ),
    models=(
        SeedModel(
            provider="worker",
            external_id="qwen_instruct",
            model_name="Qwen",
            model_key="qwen_instruct",
            capabilities={"context": 8192},
        ),
        SeedModel(
            provider="openrouter",
            external_id="gryphe/mythomax-l2-13b",
            model_name="MythoMax 13B",
            model_key="gryphe/mythomax-l2-13b",
        ),
    ),
    assignments=(
        SeedAssignment(
            model_key="qwen_instruct", display_name="Qwen", modality="chat", task="enhancement"
        ),
        SeedAssignment(
            model_key="gryphe/mythomax-l2-13b",
            display_name="MythoMax 13B",
            modality="chat",
            task="enhancement",
            priority=10,
        ),
        SeedAssignment(
            model_key="qwen_instruct",
            display_name="Qwen",
            modality="chat",
            task="chat",
            is_default=True,
        ),
    ),
    preferred="gryphe/mythomax-l2-13b",
)


def fill(database: Database) -> Database:
    assert seed(database, SEEDS, "qwen_instruct", frozenset())
    return database


Plain = sqlite3.Connection | psycopg.Connection[Any]


@contextmanager
def plain(database: Database) -> Iterator[Plain]:
    """A connection of the engine's own driver, as a shell would have it; each statement commits."""
    connection: Plain
    url = database.engine.url
    if database.is_postgres:
        connection = psycopg.connect(
            url.set(drivername="postgresql").render_as_string(hide_password=False),
            autocommit=True,
        )
    else:
        connection = sqlite3.connect(str(url.database), isolation_level=None)
    try:
        yield connection
    finally:
        connection.close()
