"""Settings and ports for tests. Flask is imported by the fixtures that need it: unit tests load
this file too, and stay quick."""

from __future__ import annotations

import os
import shutil
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import (
    ChatPort,
    FakeChatLink,
    FakeLink,
    FakeMediaLink,
    FakeSizer,
    FakeTokenizers,
    MediaPort,
    answer_query,
)
from worker.config import Access, Chat, Daemon, Limits, Media, ModelEntry, Server, Settings
from worker.protocol.messages import Message, ModelState

# Before torch is loaded. By default its threads spin while they wait for each other, and beside any
# other process that takes a processor small models become ten times as slow (docs/decisions/0005).
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

INSTRUCT, BASE, IMAGE, VIDEO = "tiny-instruct", "tiny-base", "tiny-image", "tiny-video"

CHAT_MODELS = (
    ModelState(
        id=INSTRUCT,
        kind="chat",
        status="loaded",
        display_name="Tiny Instruct",
        weight_bytes=1000,
        device="cpu",
        details={"context_tokens": 4096},
    ),
    ModelState(id=BASE, kind="chat", status="unloaded", display_name="Tiny Base"),
)
MEDIA_MODELS = (
    ModelState(
        id=IMAGE,
        kind="sdxl",
        status="loaded",
        display_name=IMAGE,
        weight_bytes=2000,
        device="cpu",
    ),
    ModelState(id=VIDEO, kind="wan", status="unloaded", display_name=VIDEO),
)


@pytest.fixture(scope="session")
def kernels(tmp_path_factory: pytest.TempPathFactory) -> None:
    """This process has the kernels of its CPU; building them takes a quarter of a minute."""
    if shutil.which("g++") is None or sys.platform != "linux":
        pytest.skip("no C++ compiler on this machine")
    from worker.engine.chat.kernels import load

    load(tmp_path_factory.mktemp("kernels"))


@pytest.fixture
def settings(tmp_path: Path) -> Settings:
    """Two chat models, one for images, one for videos; limits small enough to be met in a test."""
    return Settings(
        profile_name="test",
        profile_path=tmp_path / "test.toml",
        models_dir=tmp_path / "models",
        state_dir=tmp_path / "state",
        server=Server(),
        access=Access(keyless_inference=True),
        limits=Limits(
            body_bytes="64KiB",  # type: ignore[arg-type]  # written as in a file
            messages=20,
            prompt_chars=5000,
            images=6,
            image_pixels=1024 * 1024,
            video_pixels=832 * 480,
            frames=81,
            steps=150,
        ),
        chat=Chat(max_waiting=3, deadline_s=30.0, stream_deadline_s=300.0),
        media=Media(max_waiting=8, keep_finished=50),
        daemon=Daemon(device="cpu"),
        models=(
            ModelEntry(
                id=INSTRUCT,
                kind="chat",
                path="tiny-chat",
                aliases=["qwen_instruct", "Qwen/Qwen2.5-7B-Instruct"],
                display_name="Tiny Instruct",
            ),
            ModelEntry(
                id=BASE,
                kind="chat",
                path="tiny-chat",
                aliases=["qwen_base", "Qwen/Qwen2.5-7B"],
                display_name="Tiny Base",
            ),
            ModelEntry(id=IMAGE, kind="sdxl", path="tiny-image", aliases=["sdxl"]),
            ModelEntry(id=VIDEO, kind="wan", path="tiny-video", aliases=["wan"]),
        ),
        declared_ids=(INSTRUCT, BASE, IMAGE, VIDEO),
    )


def changed(settings: Settings, changes: dict[str, dict[str, Any]]) -> Settings:
    """`settings` with some keys of some sections replaced: `{"limits": {"messages": 3}}`."""
    sections = {
        name: getattr(settings, name).model_copy(update=values) for name, values in changes.items()
    }
    return settings.model_copy(update=sections)


@pytest.fixture
def make_chat(settings: Settings) -> Iterator[Callable[..., ChatPort]]:
    """Builds chat ports: `make_chat(keys=("k",), limits={"messages": 3})`.

    Afterwards no request may be open in their engines and no place taken.
    """
    from worker.catalog import chat_catalog, media_catalog
    from worker.front.admission import Admission
    from worker.front.app import Front, create_chat_app, places
    from worker.front.drain import Drainer

    ports: list[ChatPort] = []

    def make(
        *,
        keys: tuple[str, ...] = (),
        link: FakeLink | None = None,
        orchestrator: Callable[[Any], Message | None] | None = None,
        **sections: dict[str, Any],
    ) -> ChatPort:
        mine = changed(settings, sections)
        link = link or FakeChatLink(CHAT_MODELS)
        admission, drainer = Admission(places(mine)), Drainer()
        front = Front(
            mine, keys, drainer, chat_catalog(mine), media_catalog(mine),
            link,  # type: ignore[arg-type]
            orchestrator or answer_query,
            FakeSizer(),  # type: ignore[arg-type]
            FakeTokenizers(),  # type: ignore[arg-type]
        )  # fmt: skip
        app = create_chat_app(front, admission)
        port = ChatPort(mine, app, app.test_client(), link, admission, drainer)
        ports.append(port)
        return port

    yield make
    left = [port.link.close() for port in ports]
    assert left == [[]] * len(ports)
    assert [port.admission.taken for port in ports] == [0] * len(ports)


@pytest.fixture
def chat(make_chat: Callable[..., ChatPort]) -> ChatPort:
    """A chat port without keys."""
    return make_chat()


@pytest.fixture
def make_media(
    settings: Settings, monkeypatch: pytest.MonkeyPatch
) -> Iterator[Callable[..., MediaPort]]:
    """Builds image and video ports with a running job runner, as `make_chat` does."""
    from worker.catalog import chat_catalog, media_catalog
    from worker.front.admission import Admission
    from worker.front.app import Front, create_media_app, places
    from worker.front.drain import Drainer
    from worker.front.media import JobDesk
    from worker.jobs import maker, runner
    from worker.jobs.bell import Bell
    from worker.jobs.board import Board
    from worker.jobs.database import JOBS_FOLDER
    from worker.jobs.journal import Journal
    from worker.jobs.results import RESULTS_FOLDER, Results
    from worker.jobs.runner import JobRunner

    for module in (maker, runner):
        monkeypatch.setattr(module, "LOOK_EVERY_S", 0.01)  # so that runners end quickly
    monkeypatch.setattr(runner, "FORGET_EVERY_S", 0.0)
    ports: list[MediaPort] = []

    def no_pictures(wanted: Any, folder: Path, should_stop: Callable[[], bool]) -> Any:
        raise AssertionError("no job of this test has a picture")

    def make(
        *,
        keys: tuple[str, ...] = (),
        link: FakeLink | None = None,
        media_link: FakeLink | None = None,
        fetch: Callable[..., Any] | None = None,
        orchestrator: Callable[[Any], Message | None] | None = None,
        **sections: dict[str, Any],
    ) -> MediaPort:
        mine = changed(settings, sections)
        link = link or FakeChatLink(CHAT_MODELS)
        painter = media_link or FakeMediaLink(MEDIA_MODELS)
        admission, drainer = Admission(places(mine)), Drainer()
        front = Front(
            mine, keys, drainer, chat_catalog(mine), media_catalog(mine),
            link,  # type: ignore[arg-type]
            orchestrator or answer_query,
            FakeSizer(),  # type: ignore[arg-type]
            FakeTokenizers(),  # type: ignore[arg-type]
        )  # fmt: skip

        folder, bell = mine.state_dir / JOBS_FOLDER, Bell()
        journal, board = Journal(folder, bell), Board(bell)
        results = Results(folder / RESULTS_FOLDER)
        desk = JobDesk(journal, board, bell, results, bell.ring)
        job_runner = JobRunner(
            journal, board, bell,
            painter,  # type: ignore[arg-type]
            results,
            folder / "work",
            fetch=fetch or no_pictures,
            tell=lambda job, event: (),
            places=lambda job, assets: (),
            keep_finished=mine.media.keep_finished,
            keep_bytes=mine.media.keep_bytes,
        )  # fmt: skip
        job_runner.start()
        app = create_media_app(
            front,
            admission,
            painter,  # type: ignore[arg-type]
            desk,
        )
        port = MediaPort(
            mine, app, app.test_client(), link, admission, drainer, painter, desk, job_runner
        )
        ports.append(port)
        return port

    yield make
    for port in ports:
        port.runner.close()
        port.desk.journal.close()
    left = [port.link.close() + port.media.close() for port in ports]
    assert left == [[]] * len(ports)
    assert [port.admission.taken for port in ports] == [0] * len(ports)


@pytest.fixture
def media(make_media: Callable[..., MediaPort]) -> MediaPort:
    """An image and video port without keys."""
    return make_media()
