"""The answers of the four functions about workers: shapes, statuses, and the faults not rebuilt."""

from __future__ import annotations

import re
from collections.abc import Iterator
from datetime import UTC, datetime
from typing import Any

import pytest

from gateway.errors import InvalidRequest, NotFound
from gateway.store.database import Database
from gateway.workers.active import ActiveWorkers
from gateway.workers.client import Keys, WorkerClient
from gateway.workers.health import HealthMonitor
from gateway.workers.registration import Registration
from gateway.workers.registry import WorkerRegistry
from gateway.workers.urls import AddressPolicy, parse_worker_url
from tests.gateway.conftest import MakeDatabase
from tests.gateway.fake_worker import CAPABILITIES, ENDPOINTS, FakeWorker, closed_port_url

NOW = datetime(2026, 11, 26, 12, tzinfo=UTC)
ISO = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z")


@pytest.fixture
def database(make_database: MakeDatabase) -> Database:
    """One engine is enough here: the statements are tested with the registry."""
    return make_database("sqlite")


class Parts:
    """The functions over one database."""

    def __init__(
        self,
        database: Database,
        chat: tuple[str, ...] = (),
        media: tuple[str, ...] = (),
        policy: AddressPolicy | None = None,
    ):
        self.client = WorkerClient(policy or AddressPolicy(private_allowed=True), Keys())
        self.registry = WorkerRegistry(database, chat, media)
        self.monitor = HealthMonitor(self.registry, self.client)
        self.registration = Registration(self.registry, self.monitor, self.client.network)
        self.active = ActiveWorkers(self.registry, self.monitor)


@pytest.fixture
def parts(database: Database) -> Iterator[Parts]:
    made = Parts(database)
    yield made
    made.client.close()


@pytest.fixture
def worker() -> Iterator[FakeWorker]:
    with FakeWorker() as made:
        yield made


def chat_body(url: str) -> dict[str, Any]:
    """As the original chat worker sends it."""
    return {
        "worker_url": url,
        "auto_registered": True,
        "registration_method": "pure_inference_chat_worker",
        "worker_type": "pure_inference_engine",
        "capabilities": {"pure_inference": True},
        "timestamp": "2026-11-26T12:00:00Z",
    }


def media_body(url: str, key: str = "worker_url") -> dict[str, Any]:
    return {
        key: url,
        "auto_registered": True,
        "registration_method": "wan_worker_self_registration",
        "detection_method": "RUNPOD_POD_ID",
        "timestamp": "2026-11-26T12:00:00Z",
    }


def test_a_chat_worker_registers_and_is_known_with_its_health(
    parts: Parts, worker: FakeWorker
) -> None:
    answer = parts.registration.register_chat(chat_body(f"{worker.url}/"))

    parts.registry.refresh()
    assert set(answer) == {
        "success",
        "workerUrl",
        "healthStatus",
        "responseTimeMs",
        "registrationInfo",
    }
    assert (answer["success"], answer["workerUrl"]) == (True, worker.url)
    assert answer["healthStatus"] == "healthy"
    assert set(answer["registrationInfo"]) == {
        "auto_registered",
        "last_health_check",
        "health_status",
        "last_updated",
        "response_time_ms",
    }
    assert answer["registrationInfo"]["auto_registered"] is True
    assert ISO.fullmatch(answer["registrationInfo"]["last_health_check"])
    (known,) = parts.registry.workers("chat")
    assert (known.url, known.was_healthy) == (worker.url, True)
    assert parts.registry.workers("wan") == ()


def test_a_chat_worker_that_is_not_healthy_is_registered_all_the_same(parts: Parts) -> None:
    gone = closed_port_url()

    answer = parts.registration.register_chat(chat_body(gone))

    parts.registry.refresh()
    assert (answer["success"], answer["healthStatus"]) == (True, "unhealthy")
    assert parts.registry.workers("chat")[0].was_healthy is False


def test_a_media_worker_registers_for_both_types(parts: Parts, worker: FakeWorker) -> None:
    answer = parts.registration.update_media(media_body(worker.url))

    assert set(answer) == {
        "success",
        "message",
        "worker_url",
        "updatedAt",
        "auto_registered",
        "registration_method",
        "detection_method",
    }
    assert answer["worker_url"] == worker.url
    assert answer["detection_method"] == "RUNPOD_POD_ID"
    assert [one.worker_type for one in parts.registry.workers()] == ["sdxl", "wan"]


def test_a_media_worker_that_is_not_healthy_is_refused_and_not_kept(
    parts: Parts, worker: FakeWorker
) -> None:
    worker.health_status = 503

    for url in (worker.url, closed_port_url()):
        with pytest.raises(InvalidRequest, match="not healthy") as told:
            parts.registration.update_media(media_body(url))
        assert told.value.status == 400

    assert parts.registry.workers() == ()


def test_the_admin_pages_spelling_is_taken_and_named(parts: Parts, worker: FakeWorker) -> None:
    answer = parts.registration.update_media(media_body(worker.url, "workerUrl"))

    assert answer["worker_url"] == worker.url
    assert "workerUrl" in answer["message"]


@pytest.mark.parametrize(
    "body", [{}, {"worker_url": None}, {"worker_url": "no url"}, {"worker_url": ["x"]}]
)
def test_a_body_without_a_url_is_refused(parts: Parts, body: dict[str, Any]) -> None:
    with pytest.raises(InvalidRequest):
        parts.registration.register_chat(body)
    with pytest.raises(InvalidRequest):
        parts.registration.update_media(body)


def test_a_private_address_is_refused_before_anything_is_sent(
    database: Database, worker: FakeWorker
) -> None:
    parts = Parts(database, policy=AddressPolicy())

    for register in (parts.registration.register_chat, parts.registration.update_media):
        with pytest.raises(InvalidRequest, match="not a public one"):
            register({"worker_url": worker.url})
    parts.client.close()

    assert worker.seen == []
    assert parts.registry.workers() == ()


def test_a_static_worker_may_be_private(database: Database, worker: FakeWorker) -> None:
    trusted = frozenset({parse_worker_url(worker.url).place})
    parts = Parts(database, chat=(worker.url,), policy=AddressPolicy(trusted=trusted))

    answer = parts.registration.register_chat(chat_body(worker.url))
    parts.client.close()

    assert answer["healthStatus"] == "healthy"
    assert parts.registry.workers("chat")[0].is_static


def test_the_active_url_comes_with_endpoints_and_capabilities_in_one_request(
    parts: Parts, worker: FakeWorker
) -> None:
    parts.registration.register_chat(chat_body(worker.url))
    before = len(worker.seen)

    answer = parts.active.active_url({"worker_type": "chat"})

    assert set(answer) == {
        "success",
        "worker_url",
        "workerUrl",
        "isHealthy",
        "healthError",
        "registrationInfo",
        "worker_type",
        "supportedEndpoints",
        "workerCapabilities",
        "responseTimeMs",
    }
    assert answer["worker_url"] == answer["workerUrl"] == worker.url
    assert (answer["isHealthy"], answer["healthError"]) == (True, None)
    assert answer["supportedEndpoints"] == ENDPOINTS
    assert answer["workerCapabilities"] == CAPABILITIES
    assert len(worker.seen) == before  # the registration's probe is young enough


def test_chat_is_never_sent_to_the_image_port(parts: Parts, worker: FakeWorker) -> None:
    parts.registration.update_media(media_body(worker.url))

    with pytest.raises(NotFound, match="no chat worker is known") as told:
        parts.active.active_url({"worker_type": "chat"})

    assert told.value.status == 404
    assert parts.active.active_url({"worker_type": "sdxl"})["worker_url"] == worker.url
    assert parts.active.active_url(None)["worker_type"] == "wan"


def test_sdxl_falls_back_to_the_wan_worker_and_wan_to_nothing(
    parts: Parts, worker: FakeWorker
) -> None:
    parts.registry.register(
        worker.url, ("wan",), auto_registered=False, registration_method="", now=NOW
    )

    assert parts.active.active_url({"worker_type": "sdxl"})["worker_url"] == worker.url
    parts.registry.remove(worker.url)
    parts.registry.register(
        worker.url, ("sdxl",), auto_registered=False, registration_method="", now=NOW
    )
    with pytest.raises(NotFound):
        parts.active.active_url({"worker_type": "wan"})


def test_an_unknown_type_is_refused(parts: Parts) -> None:
    with pytest.raises(InvalidRequest):
        parts.active.active_url({"worker_type": "audio"})


def test_a_worker_that_is_not_healthy_is_answered_and_says_so(parts: Parts) -> None:
    gone = closed_port_url()
    parts.registration.register_chat(chat_body(gone))

    answer = parts.active.active_url({"worker_type": "chat"})

    assert (answer["success"], answer["worker_url"], answer["isHealthy"]) == (True, gone, False)
    assert "no connection" in answer["healthError"]


def test_of_two_workers_the_healthy_one_is_active(parts: Parts, worker: FakeWorker) -> None:
    parts.registration.register_chat(chat_body(closed_port_url()))
    parts.registration.register_chat(chat_body(worker.url))

    assert parts.active.active_url({"worker_type": "chat"})["worker_url"] == worker.url


def test_a_check_answers_for_every_worker_and_always_with_its_url(
    parts: Parts, worker: FakeWorker
) -> None:
    gone = closed_port_url()
    parts.registration.register_chat(chat_body(gone))
    parts.registration.register_chat(chat_body(worker.url))
    parts.registration.update_media(media_body(worker.url))

    answer = parts.active.check_all()

    assert set(answer) == {"success", "healthResults", "workers", "timestamp"}
    assert ISO.fullmatch(answer["timestamp"])
    assert set(answer["healthResults"]) == {"wanWorker", "chatWorker"}
    for entry in answer["healthResults"].values():
        assert set(entry) == {
            "isHealthy",
            "lastChecked",
            "responseTimeMs",
            "healthError",
            "workerUrl",
        }
        assert (entry["isHealthy"], entry["workerUrl"]) == (True, worker.url)
    assert {(one["workerUrl"], one["workerType"]) for one in answer["workers"]} == {
        (gone, "chat"),
        (worker.url, "chat"),
        (worker.url, "sdxl"),
        (worker.url, "wan"),
    }


def test_a_check_with_no_worker_is_an_answer_too(parts: Parts) -> None:
    answer = parts.active.check_all()

    assert answer["success"] is True
    assert answer["healthResults"]["chatWorker"]["isHealthy"] is False
    assert answer["healthResults"]["chatWorker"]["workerUrl"] is None
