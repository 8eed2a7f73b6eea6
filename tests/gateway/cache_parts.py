"""Databases of their own, a small configuration and edits, for tests and the benchmark of the
cache. Outages need a whole database that can be shut, so a schema in a shared one would not do."""

from __future__ import annotations

import shutil
import sqlite3
from abc import ABC, abstractmethod
from collections.abc import Iterator
from contextlib import closing, contextmanager
from pathlib import Path

import psycopg
from sqlalchemy import insert, text, update

from gateway.store.canonical import version_hash
from gateway.store.database import Database, open_database
from gateway.store.migration import migrate
from gateway.store.tables import (
    negative_prompts,
    prompt_rules,
    template_versions,
    templates,
)
from gateway.values.rows import MODES, NegativePrompt, Snapshot, Template, TemplateVersion
from tests.gateway.postgres import Server

CASES = (
    ("enhancement_sdxl", "sdxl", "image", "enhancement"),
    ("enhancement_wan", "wan", "video", "enhancement"),
    ("chat", "qwen_instruct", "chat", "chat"),
    ("generation_sdxl", "sdxl", "image", "generation"),
    ("generation_wan", "wan", "video", "generation"),
    ("playground", "qwen_instruct", "chat", "playground"),
)
TUPLES = tuple((*case[1:], mode) for case in CASES for mode in MODES)  # twelve


def small_snapshot(revision: int, word: str = "emergency") -> Snapshot:
    """The twelve templates, with `word` in their texts."""
    return Snapshot(
        revision=revision,
        templates=tuple(
            Template(
                id=number,
                template_name=f"{name}_{mode}",
                target_model=target,
                job_type=job,
                use_case=use,
                content_mode=mode,
                live=TemplateVersion(
                    id=number, version=1, system_prompt=f"{word} {name}", max_output_tokens=100
                ),
            )
            for number, (name, target, job, use, mode) in enumerate(
                ((*case, mode) for case in CASES for mode in MODES), start=1
            )
        ),
        negatives=(NegativePrompt(id=1, target_model="sdxl", content_mode="sfw"),),
        content_hash="0" * 64,
    )


def emergency() -> Snapshot:
    return small_snapshot(0)


def fill(database: Database, rules: int = 0) -> None:
    """The twelve templates and one negative prompt, which edits change."""
    with database.transaction() as connection:
        for template in small_snapshot(1, "database").templates:
            live = template.live
            connection.execute(
                insert(templates).values(
                    id=template.id,
                    template_name=template.template_name,
                    target_model=template.target_model,
                    job_type=template.job_type,
                    use_case=template.use_case,
                    content_mode=template.content_mode,
                )
            )
            connection.execute(
                insert(template_versions).values(
                    id=live.id,
                    template_id=template.id,
                    version=1,
                    system_prompt=live.system_prompt,
                    max_output_tokens=live.max_output_tokens,
                    content_hash=version_hash(live),
                )
            )
            connection.execute(
                update(templates)
                .where(templates.c.id == template.id)
                .values(live_version_id=live.id)
            )
        connection.execute(
            insert(negative_prompts).values(
                id=1, target_model="sdxl", content_mode="sfw", negative_prompt="edit 0"
            )
        )
        for number in range(rules):
            connection.execute(
                insert(prompt_rules).values(
                    name=f"rule {number}",
                    rule_type=("prepend", "append")[number % 2],
                    slot=("system", "user")[number // 2 % 2],
                    body=f"Keep detail {number}.",
                    match={"target_model": CASES[number % len(CASES)][1]},
                    priority=number,
                )
            )


def edit(database: Database, word: str) -> int:
    """Change a row by plain SQL; the revision that the change has."""
    with database.transaction() as connection:
        connection.execute(
            text("UPDATE negative_prompts SET negative_prompt = :word WHERE id = 1"),
            {"word": word},
        )
        return int(connection.scalar(text("SELECT revision FROM config_state")) or 0)


class Place(ABC):
    """A database that a test owns and can take away and bring back."""

    url: str

    @abstractmethod
    def take_away(self) -> None: ...

    @abstractmethod
    def bring_back(self) -> None: ...

    @contextmanager
    def opened(self) -> Iterator[Database]:
        database = open_database(self.url)
        try:
            yield database
        finally:
            database.dispose()


class SqlitePlace(Place):
    def __init__(self, folder: Path):
        self._path = folder / "gateway.sqlite3"
        self._away = folder / "away"
        self.url = f"sqlite:///{self._path}"

    def take_away(self) -> None:
        self._away.mkdir()
        for one in self._path.parent.glob("gateway.sqlite3*"):
            one.rename(self._away / one.name)

    def bring_back(self) -> None:
        for one in self._away.iterdir():
            one.rename(self._path.parent / one.name)
        self._away.rmdir()

    def raw(self, statement: str) -> None:
        """As the sqlite3 shell would."""
        with closing(sqlite3.connect(self._path)) as connection, connection:
            connection.execute(statement)


class PostgresPlace(Place):
    def __init__(self, server: Server, template: str | None):
        self._server = server
        self.name = server.create(template)
        self.url = server.url_of(self.name)

    def take_away(self) -> None:
        self._alter("ALLOW_CONNECTIONS false")
        self._kill("")

    def bring_back(self) -> None:
        self._alter("ALLOW_CONNECTIONS true")

    def kill_listeners(self) -> int:
        """End every listening connection; how many there were."""
        return self._kill("AND application_name = 'gateway-listener'")

    def drop(self) -> None:
        self._server.drop(self.name)

    def _alter(self, what: str) -> None:
        with psycopg.connect(self._server.url, autocommit=True) as connection:
            connection.execute(f"ALTER DATABASE {self.name} {what}".encode())

    def _kill(self, which: str) -> int:
        with psycopg.connect(self._server.url, autocommit=True) as connection:
            found = connection.execute(
                "SELECT pg_terminate_backend(pid) FROM pg_stat_activity "
                f"WHERE datname = '{self.name}' {which}".encode()
            ).fetchall()
        return len(found)


@contextmanager
def sqlite_place(folder: Path, migrated: Path | None = None, rules: int = 0) -> Iterator[Place]:
    """A filled database; migrated: a migrated file to copy."""
    place = SqlitePlace(folder)
    if migrated is not None:
        shutil.copy(migrated, folder / "gateway.sqlite3")
    _prepare(place, migrated is not None, rules)
    yield place


@contextmanager
def postgres_place(
    server: Server, migrated: str | None = None, rules: int = 0
) -> Iterator[PostgresPlace]:
    """The same, gone at the end; migrated: a migrated database to copy."""
    place = PostgresPlace(server, migrated)
    try:
        _prepare(place, migrated is not None, rules)
        yield place
    finally:
        place.drop()


def _prepare(place: Place, is_migrated: bool, rules: int) -> None:
    with place.opened() as database:
        if not is_migrated:
            migrate(database)
        fill(database, rules)
