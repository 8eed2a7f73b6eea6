"""An app over a SQLite database, with fakes for the parts that talk to others."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import jwt
from flask.testing import FlaskClient
from flask_openapi3.openapi import OpenAPI
from werkzeug.test import TestResponse

from gateway.access.caller import Scope
from gateway.access.gate import Gate
from gateway.access.keys import create_key
from gateway.access.tokens import TokenVerifier
from gateway.access.users import create_user
from gateway.cache.holder import Held
from gateway.cache.instances import InstanceReport, RefreshReport
from gateway.config import GatewaySection, Settings
from gateway.errors import RevisionNotReached
from gateway.front.app import API_ROUTES, FUNCTION_ROUTES, Routes, create_app
from gateway.front.services import Services
from gateway.models.refresh import SyncResults
from gateway.store.database import Database, open_database
from gateway.store.editing import Editor, edit
from gateway.store.loading import load_snapshot
from gateway.store.model_edits import create_assignment, create_model, create_provider
from gateway.store.template_edits import create_template
from gateway.tokens.counters import TokenCounters
from gateway.values.seeds import SeedAssignment, SeedModel, SeedProvider, SeedTemplate

NOW = datetime(2026, 11, 26, 12, 0, tzinfo=UTC)
USER = "6f9619ff-8b86-4011-b42d-00c04fc964ff"
OTHER = "7f9619ff-8b86-4011-b42d-00c04fc964ff"
ADMIN_USER = "8f9619ff-8b86-4011-b42d-00c04fc964ff"
JWT_SECRET = "a-secret-of-forty-characters-for-tests-x"
SERVICE_KEY = "sb_secret_0123456789abcdef"
PROVIDER_SECRET = "sk-of-a-provider-0123456789"
DATABASE_URL = "postgresql://gateway:pass-of-the-database@db/gateway"

TEMPLATE = SeedTemplate(
    template_name="enhancement_sdxl_sfw",
    target_model="sdxl",
    job_type="image",
    use_case="enhancement",
    content_mode="sfw",
    system_prompt="Describe the picture.",
    max_output_tokens=160,
    target_token_limit=75,
)


class FakePrompts:
    """The façade of the cache, over the database itself; may be told how to fail."""

    def __init__(self, database: Database) -> None:
        self.database = database
        self.level = 0
        self.error: Exception | None = None
        self.reached = True
        self.woken = 0

    def held(self, min_revision: int | None = None) -> Held:
        if self.error is not None:
            raise self.error
        with self.database.reading() as connection:
            snapshot = load_snapshot(connection)
        if min_revision is not None and snapshot.revision < min_revision:
            raise RevisionNotReached("not yet", retry_after_s=1.0)
        return Held(snapshot=snapshot, level=self.level, verified_at=0.0, age_ms=1.5)

    def status(self) -> Mapping[str, Any]:
        return {"revision": self.held().snapshot.revision, "instances": []}

    def refresh(self, timeout_s: float = 5.0) -> RefreshReport:
        one = InstanceReport(
            instance_id="host:1:ab",
            state="reached" if self.reached else "waiting",
            applied_revision=1,
            waited_ms=2.0 if self.reached else None,
            seen_s=0.1,
        )
        return RefreshReport(
            revision=self.held().snapshot.revision,
            reached=self.reached,
            slowest=one.instance_id,
            slowest_ms=one.waited_ms,
            instances=(one,),
        )

    def wake(self) -> None:
        self.woken += 1


class FakeMetrics:
    def summary(self, hours: float) -> Mapping[str, Any]:
        return {"hours": hours, "count": 0}


class FakeRefresh:
    """Records who asked for what."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str, bool]] = []

    def __call__(self, *, provider: str, actor: str, confirmed: bool) -> SyncResults:
        self.asked.append((provider, actor, confirmed))
        return SyncResults(provider=provider, source="built_in", added=5)


def seed_some(editor: Editor) -> None:
    """A template, our worker, one model, and its default: as little as a request needs."""
    create_template(editor, TEMPLATE)
    create_provider(editor, SeedProvider(name="worker", kind="worker"))
    create_provider(
        editor,
        SeedProvider(
            name="openrouter",
            kind="openai",
            base_url="https://openrouter.ai/api/v1",
            secret_ref="OPENROUTER_API_KEY",
        ),
    )
    create_model(
        editor,
        SeedModel(
            provider="worker",
            external_id="qwen_instruct",
            model_name="Qwen",
            model_key="qwen_instruct",
        ),
    )
    create_assignment(
        editor,
        SeedAssignment(
            model_key="qwen_instruct",
            display_name="Qwen",
            modality="chat",
            task="enhancement",
            is_default=True,
        ),
    )


class Bench:
    """An app, its parts, and one credential of each kind in `headers`."""

    def __init__(
        self,
        database: Database,
        state_dir: Path,
        function_routes: Sequence[Routes] = FUNCTION_ROUTES,
        api_routes: Sequence[Routes] = API_ROUTES,
    ) -> None:
        self.elapsed_s = 0.0
        self.database = database
        self.prompts = FakePrompts(database)
        self.refresh_models = FakeRefresh()
        self.settings = Settings(
            section=GatewaySection(body_bytes=64 * 1024),
            state_dir=state_dir,
            models_dir=state_dir,
            database_url=DATABASE_URL,
            environment={"OPENROUTER_API_KEY": PROVIDER_SECRET, "GATEWAY_JWT_SECRET": JWT_SECRET},
        )
        self.services = Services(
            settings=self.settings,
            database=database,
            gate=Gate(
                database,
                (SERVICE_KEY,),
                TokenVerifier(JWT_SECRET, None),
                self.wall,
                lambda: self.elapsed_s,
            ),
            prompts=self.prompts,
            counters=TokenCounters({}),
            refresh_models=self.refresh_models,
            metrics=FakeMetrics(),
            workers_seen=lambda: {"chat": {"known": 1, "healthy": 1}},
            wall=self.wall,
            clock=lambda: self.elapsed_s,
        )
        self.app: OpenAPI = create_app(self.services, function_routes, api_routes)
        self.client: FlaskClient = self.app.test_client()
        self.secrets: dict[str, str] = {}
        self._make_callers()

    def wall(self) -> datetime:
        return NOW + timedelta(seconds=self.elapsed_s)

    def ask(
        self,
        method: str,
        path: str,
        who: str | None = "admin",
        body: Mapping[str, Any] | None = None,
        **more: Any,
    ) -> TestResponse:
        """A request of one of `secrets`; None: without credentials."""
        headers = dict(more.pop("headers", {}))
        if who is not None:
            headers["Authorization"] = f"Bearer {self.secrets[who]}"
        if body is not None:
            more["json"] = body
        return self.client.open(path, method=method, headers=headers, **more)

    def edit_all(self) -> None:
        with edit(self.database, actor="test", at=NOW) as editor:
            seed_some(editor)

    def _make_callers(self) -> None:
        with self.database.transaction() as connection:
            create_user(connection, user_id=USER, now=NOW, values={})
            create_user(connection, user_id=OTHER, now=NOW, values={})
            create_user(connection, user_id=ADMIN_USER, now=NOW, values={"is_admin": True})
            for scope in Scope:
                _, self.secrets[scope.value] = create_key(
                    connection, name=f"key {scope}", scopes=frozenset({scope}), now=NOW
                )
        self.secrets["service"] = SERVICE_KEY
        self.secrets["user"] = token(USER)
        self.secrets["other user"] = token(OTHER)
        self.secrets["admin user"] = token(ADMIN_USER)
        self.secrets["anon"] = token(None, role="anon")
        self.secrets["wrong"] = "vgw_0123456789_" + "a" * 43


@contextmanager
def open_bench(
    folder: Path, migrated_sqlite: Path, function_routes: Sequence[Routes] = FUNCTION_ROUTES
) -> Iterator[Bench]:
    """A bench with some rows, over a copy of a migrated file; for the tests of a whole module."""
    path = folder / "gateway.sqlite3"
    shutil.copy(migrated_sqlite, path)
    database = open_database(f"sqlite:///{path}")
    bench = Bench(database, folder, function_routes)
    bench.edit_all()
    yield bench
    database.dispose()


def token(user_id: str | None, **changes: Any) -> str:
    claims = {
        "sub": user_id,
        "role": "authenticated",
        "aud": "authenticated",
        "exp": NOW.timestamp() + 3600,
        **changes,
    }
    return jwt.encode({key: one for key, one in claims.items() if one}, JWT_SECRET, "HS256")
