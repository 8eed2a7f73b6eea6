"""One daemon for the tests that leave it as they found it."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.integration.daemon import Daemon, running_daemon
from worker.catalog import chat_catalog, media_catalog
from worker.config import load_settings
from worker.engine.media import progress
from worker.modelfiles import check_files


@pytest.fixture(scope="session", autouse=True)
def demo_models() -> None:
    settings = load_settings("demo", {})
    specs = (*chat_catalog(settings).specs, *media_catalog(settings).specs)
    problems = [problem for spec in specs for problem in check_files(spec)]
    if problems:
        pytest.fail(f"the demo models are not there: {problems[0]}", pytrace=False)


@pytest.fixture
def every_step_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By engines in this process, however quick they are."""
    monkeypatch.setattr(progress, "TELL_EVERY_S", 0.0)


@pytest.fixture(scope="session")
def daemon(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Daemon]:
    with running_daemon(tmp_path_factory.mktemp("daemon")) as running:
        yield running
