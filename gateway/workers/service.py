"""Puts the parts of this package together for a process. Opens no connection and reads no table."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from gateway.config import Settings
from gateway.store.database import Database
from gateway.tokens.files import sources
from gateway.workers.active import ActiveWorkers
from gateway.workers.attester import Attester
from gateway.workers.chatml import ChatmlTokenizer, load_chatml
from gateway.workers.client import WorkerClient, make_client
from gateway.workers.health import HealthLoop, HealthMonitor
from gateway.workers.media import MediaWorkers
from gateway.workers.pool import WorkerPool
from gateway.workers.registration import Registration
from gateway.workers.registry import WorkerRegistry
from gateway.workers.served import ServedModels

log = logging.getLogger(__name__)

CHAT_TOKENIZER = "qwen"  # the name in [gateway.tokenizers] of the chat model's


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkersService:
    """Everything about workers in one process. Made after a fork."""

    registry: WorkerRegistry
    monitor: HealthMonitor
    loop: HealthLoop
    client: WorkerClient
    pool: WorkerPool
    media: MediaWorkers
    registration: Registration
    active: ActiveWorkers

    def start(self) -> None:
        """Read who is registered and begin to probe. A database that is gone is no reason to stop:
        the workers of the settings are there."""
        self.registry.try_refresh()
        self.loop.start()

    def close(self) -> None:
        """After `start`: stop probing and cut idle connections. Takes as long as one probe."""
        self.loop.stop()
        self.client.close()


def make_workers(
    settings: Settings, database: Database, tokenizer_files: Mapping[str, Path] | None = None
) -> WorkersService:
    """tokenizer_files: by name, as gateway/tokens has them; of `qwen` prompt ids are computed.

    Raises InvalidRequest for a static worker URL that is none, ConfigError for a broken tokenizer.
    """
    section = settings.section
    client = make_client(settings)
    registry = WorkerRegistry(database, section.chat_workers, section.media_workers)
    monitor = HealthMonitor(registry, client)
    attester = Attester(ServedModels(client), chat_tokenizers(tokenizer_files or {}))
    return WorkersService(
        registry=registry,
        monitor=monitor,
        loop=HealthLoop(monitor),
        client=client,
        pool=WorkerPool(registry, monitor, client, attester, on_mismatch=section.on_mismatch),
        media=MediaWorkers(registry, monitor, client),
        registration=Registration(registry, monitor, client.network),
        active=ActiveWorkers(registry, monitor),
    )


def chat_tokenizers(files: Mapping[str, Path]) -> tuple[ChatmlTokenizer, ...]:
    """ChatML tokenizers to recompute prompt ids with; none where the file is not there."""
    path = files.get(CHAT_TOKENIZER)
    found = () if path is None else sources(path)
    if not found:
        log.warning(
            "no file of tokenizer %s: a worker's prompt ids are only held against earlier ones",
            CHAT_TOKENIZER,
        )
    return tuple(load_chatml(source) for source in found if source.name == "tokenizer.json")
