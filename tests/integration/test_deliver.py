"""Callbacks and webhooks over real connections: signed, repeated until they are taken, in order,
and once in effect wherever a connection breaks."""

from __future__ import annotations

import hashlib
import hmac
import json
import socket
import ssl
import threading
import uuid
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest

from tests.cutting_proxy import CuttingProxy, cutting_proxy
from tests.supabase_functions import Cut, FunctionsState, Hang, Say, running_functions
from worker.jobs.callbacks import Facts, asset_keys, callback_body, serialise, webhook_body
from worker.jobs.job import Status
from worker.protocol.messages import AssetFile, RenderParams
from worker.storage import deliver
from worker.storage.addresses import Addresses
from worker.storage.deliver import (
    CALLBACK,
    LEAST_TRIES,
    WEBHOOK,
    Again,
    Alarm,
    Delivered,
    Delivery,
    Outcome,
    Sender,
    backoff_s,
    is_dead,
    next_due,
    signature,
    supersedes,
)
from worker.storage.pinned import PinnedHttp
from worker.storage.rows import JobRows
from worker.storage.service import Service

NOW = 1_760_000_000.0
KEY, SECRET = "service-key", "callback-secret"
USER = "user"
TLS = ssl.create_default_context()  # made once: it takes longer than a test


# --- what is told ------------------------------------------------------------------------------


def facts(job_id: str, status: Status = Status.COMPLETED, count: int = 2, **more: Any) -> Facts:
    assets = tuple(
        AssetFile(
            file=f"{index}.png", thumbnail=f"{index}.thumb.webp", type="image",
            mime_type="image/png", width=64, height=64, seed=7 + index, size_bytes=10, sha256="ab",
        )
        for index in range(count)
    )  # fmt: skip
    params = RenderParams(
        prompt="a red circle", negative_prompt=None, width=64, height=64, steps=4,
        guidance_scale=7.5, seed=7, num_images=count,
    )  # fmt: skip
    usual: dict[str, Any] = {
        "job_id": job_id,
        "job_type": "sdxl_image_fast",
        "status": status,
        "at": NOW,
        "params": params,
        "assets": assets if status is Status.COMPLETED else (),
        "keys": asset_keys(USER, job_id, assets),
        "seconds": {"denoise": 1.5},
    }
    return Facts(**{**usual, **more})


def callback(told: Facts, sequence: int = 2) -> Delivery:
    body = callback_body(told)
    assert body is not None
    return Delivery(
        id=sequence, job_id=told.job_id, sequence=sequence, kind=CALLBACK, url="",
        content=serialise(body), created_at=NOW,
    )  # fmt: skip


def webhook(url: str, told: Facts, sequence: int = 2, **more: Any) -> Delivery:
    return Delivery(
        id=more.pop("id", sequence), job_id=told.job_id, sequence=sequence, kind=WEBHOOK, url=url,
        content=serialise(webhook_body(told, sequence)), created_at=NOW, **more,
    )  # fmt: skip


class Outbox:
    """What waits, with a clock by hand; sends one delivery after the other. The product's own
    (worker/jobs/outbox.py) keeps it on disk."""

    def __init__(self, sender: Sender, deliveries: Sequence[Delivery], give_up_after_s: float):
        self.waiting = list(deliveries)
        self.dead: list[Delivery] = []
        self.now = NOW
        self.tries: list[tuple[float, Delivery, Outcome]] = []
        self._sender = sender
        self._give_up_after_s = give_up_after_s

    def tell(self, new: Delivery) -> None:
        """One more, which may make another one void."""
        event = json.loads(new.content)["event"]
        self.waiting = [
            old
            for old in self.waiting
            if old.lane != new.lane or not supersedes(event, json.loads(old.content)["event"])
        ]
        self.waiting.append(new)

    def run(self, until_s: float = 10_000.0) -> None:
        """Until nothing waits, or so much time is over."""
        while self.waiting and self.now <= NOW + until_s:
            one = next_due(self.waiting, self.now)
            if one is None:
                self.now = min(left.next_at for left in self.waiting if left.next_at > self.now)
                continue
            found = self._sender.send(one, self.now)
            self.tries.append((self.now - NOW, one, found))
            self.waiting.remove(one)
            if isinstance(found, Delivered):
                continue
            attempts = one.attempts + 1
            if is_dead(one.created_at, self.now, attempts, self._give_up_after_s):
                self.dead.append(one)
                continue
            after_s = found.after_s or backoff_s(attempts, 0.5)
            self.waiting.append(replace(one, attempts=attempts, next_at=self.now + after_s))


# --- the other side ----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def project() -> Iterator[tuple[str, FunctionsState]]:
    state = FunctionsState(service_key=KEY, callback_secret=SECRET)
    with running_functions(state) as url:
        yield url, state


@pytest.fixture
def functions(project: tuple[str, FunctionsState]) -> Iterator[FunctionsState]:
    """The project, as new."""
    _, state = project
    for kept in (state.jobs, state.assets, state.calls, state.faults, state.characters):
        kept.clear()
    state.let_go.clear()
    state.repeated_assets = 0
    state.callback_secret, state.checks_signatures = SECRET, True
    yield state
    state.let_go.set()


class Nobody:
    """For tests without webhooks."""

    def post(self, url: str, **more: Any) -> Any:
        raise AssertionError("no webhook was to be sent")


@pytest.fixture
def make_sender() -> Iterator[Callable[..., Sender]]:
    services: list[Service] = []

    def make(url: str, key: str = KEY, secret: str | None = SECRET) -> Sender:
        services.append(Service(url, key, secret, verify=TLS))
        return Sender(services[-1], Nobody())

    yield make
    for service in services:
        service.close()


@pytest.fixture
def sender(
    project: tuple[str, FunctionsState],
    functions: FunctionsState,
    make_sender: Callable[..., Sender],
) -> Sender:
    return make_sender(project[0])


@dataclass
class Heard:
    path: str
    headers: dict[str, str]  # names in lower case
    content: bytes

    @property
    def body(self) -> Any:
        return json.loads(self.content)


@dataclass
class Receiver:
    """Somebody's webhook. Answers `answers` first, one each by path, and 200 after that."""

    url: str = ""
    heard: list[Heard] = field(default_factory=list)
    taken: list[Heard] = field(default_factory=list)  # answered with 2xx
    answers: dict[str, list[int]] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)  # of each answer
    let_go: threading.Event = field(default_factory=threading.Event)

    @property
    def origin(self) -> str:
        return self.url


@pytest.fixture(scope="module")
def receiver_server() -> Iterator[Receiver]:
    receiver = Receiver()

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            content = self.rfile.read(int(self.headers["Content-Length"]))
            headers = {name.lower(): value for name, value in self.headers.items()}
            heard = Heard(self.path, headers, content)
            receiver.heard.append(heard)
            if self.path == "/hang":
                receiver.let_go.wait(30)
            waiting = receiver.answers.get(self.path)
            status = waiting.pop(0) if waiting else 200
            if 200 <= status < 300:
                receiver.taken.append(heard)
            self.send_response(status)
            for name, value in receiver.headers.items():
                self.send_header(name, value)
            self.send_header("Content-Length", "0")
            self.end_headers()

        def log_message(self, *arguments: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    receiver.url = f"http://127.0.0.1:{server.server_port}"
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    yield receiver
    receiver.let_go.set()
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def receiver(receiver_server: Receiver) -> Receiver:
    """Somebody's webhook, as new."""
    for kept in (receiver_server.heard, receiver_server.taken):
        kept.clear()
    receiver_server.answers.clear()
    receiver_server.headers.clear()
    receiver_server.let_go.clear()
    return receiver_server


@pytest.fixture
def pinned(receiver: Receiver) -> Sender:
    """Sends webhooks as the product does; of private addresses only the receiver's is allowed."""
    return Sender(None, PinnedHttp(Addresses(frozenset({receiver.origin})), verify=TLS))


@pytest.fixture
def proxy(project: tuple[str, FunctionsState]) -> Iterator[CuttingProxy]:
    with cutting_proxy(project[0]) as one:
        yield one


# --- callbacks ---------------------------------------------------------------------------------


def test_a_callback_is_taken_and_the_bytes_that_arrive_are_the_ones_that_were_signed(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job()
    told = callback(facts(job))

    assert sender.send(told, NOW) == Delivered(200)

    call = functions.calls[0]
    assert call.content == told.content
    assert call.headers["authorization"] == f"Bearer {KEY}"
    assert call.headers["apikey"] == KEY
    assert call.headers["content-type"] == "application/json"
    digest = hmac.new(SECRET.encode(), call.content, hashlib.sha256).hexdigest()
    assert call.headers["x-callback-signature"] == f"sha256={digest}"
    row = functions.jobs[job]
    assert (row["status"], row["completed_at"]) == ("completed", "2025-10-09T08:53:20.000Z")
    assert row["metadata"]["generation_time"] == 1.5


def test_assets_arrive_at_their_places_with_their_seeds(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job()

    sender.send(callback(facts(job, count=3)), NOW)

    assets = functions.assets_of(job)
    assert [asset["asset_index"] for asset in assets] == [0, 1, 2]
    assert [asset["generation_seed"] for asset in assets] == [7, 8, 9]
    assert assets[2]["temp_storage_path"] == f"{USER}/{job}/2.png"
    assert assets[2]["thumbnail_path"] == f"{USER}/{job}/2.thumb.webp"
    settings = assets[0]["generation_settings"]
    assert (settings["steps"], settings["guidance_scale"], settings["width"]) == (4, 7.5, 64)


def test_a_videos_length_is_computed_from_its_real_frames(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job(job_type="video_high", model_type="wan", format="video")
    film = AssetFile(
        file="0.mp4", thumbnail="0.thumb.webp", type="video", mime_type="video/mp4", width=480,
        height=832, seed=7, size_bytes=10, sha256="ab", frames=81, fps=16, duration_s=5.0625,
    )  # fmt: skip
    told = facts(
        job, count=0, job_type="video_high", assets=(film,), keys=asset_keys(USER, job, (film,))
    )

    sender.send(callback(told), NOW)

    (asset,) = functions.assets_of(job)
    assert (asset["asset_type"], asset["mime_type"]) == ("video", "video/mp4")
    assert (asset["duration_seconds"], asset["generation_seed"]) == (6, 7)


def test_a_portraits_seed_fits_the_column_that_it_is_copied_to(
    sender: Sender, functions: FunctionsState
) -> None:
    wanted = {"destination": "character_portrait", "character_id": "c"}
    job = functions.add_job(metadata=wanted)

    assert sender.send(callback(facts(job)), NOW) == Delivered(200)

    assert functions.characters["c"]["seed_locked"] == 7


def test_a_prompt_with_a_character_that_the_database_refuses_arrives_all_the_same(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job()

    assert sender.send(callback(facts(job, original_prompt="a\0b")), NOW) == Delivered(200)

    assert functions.jobs[job]["metadata"]["original_prompt"] == "a\ufffdb"


@pytest.mark.parametrize("secret", ["another", None])
def test_a_missing_or_wrong_signature_is_an_alarm(
    functions: FunctionsState,
    project: tuple[str, FunctionsState],
    make_sender: Callable[..., Sender],
    secret: str | None,
) -> None:
    """The first worker signed nothing; since 2026-04 each of its results was refused."""
    job = functions.add_job()

    found = make_sender(project[0], secret=secret).send(callback(facts(job)), NOW)

    assert found == Alarm("answered 401")
    assert functions.jobs[job]["status"] == "queued"


def test_a_wrong_service_key_is_an_alarm(
    functions: FunctionsState,
    project: tuple[str, FunctionsState],
    make_sender: Callable[..., Sender],
) -> None:
    job = functions.add_job()

    found = make_sender(project[0], key="wrong").send(callback(facts(job)), NOW)

    assert found == Alarm("answered 401")
    assert functions.jobs[job]["status"] == "queued"


def test_a_server_that_does_not_know_the_secret_yet_is_tried_again(
    sender: Sender, functions: FunctionsState
) -> None:
    functions.callback_secret = None

    assert sender.send(callback(facts(functions.add_job())), NOW) == Again("answered 500")


@pytest.mark.parametrize("secret", [SECRET, None])
def test_an_older_deployment_takes_callbacks_with_and_without_a_signature(
    functions: FunctionsState,
    project: tuple[str, FunctionsState],
    make_sender: Callable[..., Sender],
    secret: str | None,
) -> None:
    functions.checks_signatures = False
    job = functions.add_job()

    found = make_sender(project[0], secret=secret).send(callback(facts(job)), NOW)

    assert found == Delivered(200)
    assert functions.jobs[job]["status"] == "completed"


def test_without_a_project_a_callback_waits_with_an_alarm() -> None:
    found = Sender(None, Nobody()).send(callback(facts("job")), NOW)

    assert isinstance(found, Alarm)


@pytest.mark.parametrize("before", ["completed", "cancelled"])
@pytest.mark.parametrize("after", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
def test_a_row_that_is_final_stays_as_it_is(
    sender: Sender, functions: FunctionsState, before: str, after: Status
) -> None:
    job = functions.add_job(status=before)

    assert sender.send(callback(facts(job, after)), NOW) == Delivered(200)

    assert functions.jobs[job]["status"] == before
    assert functions.jobs[job]["completed_at"] is None
    assert functions.assets_of(job) == []


def test_a_job_that_nobody_knows_is_taken_so_that_its_delivery_ends(sender: Sender) -> None:
    assert sender.send(callback(facts(str(uuid.uuid4()))), NOW) == Delivered(200)


def test_a_job_that_has_failed_may_still_be_completed(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job()

    sender.send(callback(facts(job, Status.FAILED, error="the device is full"), 1), NOW)
    assert functions.jobs[job]["error_message"] == "the device is full"
    sender.send(callback(facts(job)), NOW)

    assert functions.jobs[job]["status"] == "completed"
    assert functions.jobs[job]["error_message"] is None
    assert len(functions.assets_of(job)) == 2


def test_a_job_that_was_cancelled_at_the_worker_ends_in_its_row(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job(status="processing")

    sender.send(callback(facts(job, Status.CANCELLED)), NOW)

    assert functions.jobs[job]["status"] == "cancelled"


@pytest.mark.parametrize("end", [Status.COMPLETED, Status.FAILED, Status.CANCELLED])
def test_processing_never_overwrites_a_finish_however_late_it_comes(
    sender: Sender,
    functions: FunctionsState,
    project: tuple[str, FunctionsState],
    end: Status,
) -> None:
    """In the field `processing` was a callback: it set `completed_at`, and after a finish the
    status too."""
    service = Service(project[0], KEY, verify=TLS)
    rows, job = JobRows(service), functions.add_job()

    rows.mark_processing(job, NOW)
    assert functions.jobs[job]["status"] == "processing"
    assert functions.jobs[job]["completed_at"] is None
    sender.send(callback(facts(job, end)), NOW)
    finished = dict(functions.jobs[job])
    rows.mark_processing(job, NOW)

    assert functions.jobs[job] == finished
    assert finished["status"] == end.value
    service.close()


def test_an_answer_that_is_lost_costs_a_repeat_and_changes_nothing(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job()
    functions.script("job-callback", Cut(done=True), Cut(), Say(502), Cut(done=True))
    outbox = Outbox(sender, [callback(facts(job))], 1e6)

    outbox.run()

    assert [type(found).__name__ for _, _, found in outbox.tries] == ["Again"] * 4 + ["Delivered"]
    assert len(functions.assets_of(job)) == 2
    assert functions.repeated_assets == 0


def test_a_failure_that_is_told_twice_says_the_same_twice(
    sender: Sender, functions: FunctionsState
) -> None:
    """`failed` is not final at the service, so a repeat is applied again."""
    job = functions.add_job()
    told = callback(facts(job, Status.FAILED, error="the device is full", error_code="busy"))

    sender.send(told, NOW)
    first = dict(functions.jobs[job])
    sender.send(told, NOW)

    second = functions.jobs[job]
    for row in (first, second):
        row["metadata"] = {**row["metadata"], "callback_received_at": "then"}
    assert second == first


def test_a_service_that_hangs_is_tried_again(
    sender: Sender, functions: FunctionsState, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver, "CALLBACK_TIMEOUT_S", 0.1)
    functions.script("job-callback", Hang())

    found = sender.send(callback(facts(functions.add_job())), NOW)

    assert found == Again("no answer (ReadTimeout)")


def test_an_answer_whose_body_never_ends_is_an_answer(
    make_sender: Callable[..., Sender], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver, "CALLBACK_TIMEOUT_S", 0.1)
    listener = socket.create_server(("127.0.0.1", 0))
    done = threading.Event()

    def serve() -> None:
        client, _ = listener.accept()
        with client:
            client.recv(65536)
            client.sendall(b"HTTP/1.1 200 OK\r\nContent-Length: 1000\r\n\r\nok")
            done.wait(30)

    thread = threading.Thread(target=serve, daemon=True)
    thread.start()

    found = make_sender(f"http://127.0.0.1:{listener.getsockname()[1]}").send(
        callback(facts("job", count=1)), NOW
    )

    assert found == Delivered(200)
    done.set()
    thread.join()
    listener.close()


def test_a_wish_to_come_back_later_is_heeded(sender: Sender, functions: FunctionsState) -> None:
    functions.script(
        "job-callback",
        Say(503, "", {"Retry-After": "77"}),
        Say(429, "", {"Retry-After": "Thu, 09 Oct 2025 08:56:40 GMT"}),  # 200 s after NOW
        Say(503),
        Say(429, "", {"Retry-After": "0"}),
    )
    outbox = Outbox(sender, [callback(facts(functions.add_job()))], 1e6)

    outbox.run()

    assert [at for at, _, _ in outbox.tries] == [0.0, 77.0, 200.0, 204.0, 205.0]


def test_an_alarm_is_tried_slowly_and_ends_when_somebody_has_looked(
    sender: Sender, functions: FunctionsState
) -> None:
    job = functions.add_job()
    functions.script("job-callback", Say(401, "Unauthorized"), Say(400, "no"))
    outbox = Outbox(sender, [callback(facts(job))], 1e6)

    outbox.run()

    assert [at for at, _, _ in outbox.tries] == [0.0, 600.0, 1200.0]
    assert functions.jobs[job]["status"] == "completed"


def _cut_everywhere(
    functions: FunctionsState, proxy: CuttingProxy, sender: Sender, way: str
) -> list[Outcome]:
    """Cut at every byte of the request or of the answer, each time with a job of its own; what
    each first try found.

    Every job is told again until it is taken, and must have been made once in effect.
    """
    whole = callback(facts(functions.add_job(), count=1))
    assert sender.send(whole, NOW) == Delivered(200)
    (length,) = proxy.sent if way == "request" else proxy.received
    assert length > 150
    firsts = []
    for place in range(length):
        job = functions.add_job()
        proxy.cut(**{f"{way}_after": place})
        outbox = Outbox(sender, [callback(facts(job, count=1))], 1e6)
        outbox.run()
        firsts.append(outbox.tries[0][2])
        assert len(outbox.tries) == (1 if isinstance(firsts[-1], Delivered) else 2)
        assert functions.jobs[job]["status"] == "completed"
        assert [asset["asset_index"] for asset in functions.assets_of(job)] == [0]
        functions.assets.clear()
        functions.jobs.clear()
    assert functions.repeated_assets == 0
    return firsts


def test_a_request_that_is_cut_at_any_byte_is_repeated_until_it_is_taken_once(
    functions: FunctionsState, proxy: CuttingProxy, make_sender: Callable[..., Sender]
) -> None:
    firsts = _cut_everywhere(functions, proxy, make_sender(proxy.url), "request")

    assert {type(found) for found in firsts} == {Again}
    # Nothing of a cut request was taken: each job was told completely once.
    taken = [call for call in functions.calls_of("job-callback") if call.status == 200]
    assert len(taken) == len(firsts) + 1


def test_an_answer_that_is_cut_at_any_byte_leads_to_no_second_effect(
    functions: FunctionsState, proxy: CuttingProxy, make_sender: Callable[..., Sender]
) -> None:
    firsts = _cut_everywhere(functions, proxy, make_sender(proxy.url), "response")

    # Until the last byte of the headers nothing is known; after that all that matters is.
    kinds = [type(found) for found in firsts]
    known_from = kinds.index(Delivered)
    assert set(kinds[:known_from]) == {Again}
    assert set(kinds[known_from:]) == {Delivered}
    assert known_from > 100


# --- webhooks ----------------------------------------------------------------------------------


def test_a_webhook_is_signed_with_its_own_secret_and_keeps_its_id_over_tries(
    pinned: Sender, receiver: Receiver
) -> None:
    receiver.answers["/hook"] = [500, 503, 200]
    told = webhook(f"{receiver.url}/hook", facts("job-a"), secret="its own")
    outbox = Outbox(pinned, [told], 1e6)

    outbox.run()

    assert len(receiver.heard) == 3
    assert {heard.content for heard in receiver.heard} == {told.content}
    assert {heard.headers["x-webhook-id"] for heard in receiver.heard} == {"job-a-2"}
    assert [heard.headers["x-webhook-attempt"] for heard in receiver.heard] == ["1", "2", "3"]
    wanted = signature("its own", told.content)
    assert {heard.headers["x-webhook-signature"] for heard in receiver.heard} == {wanted}
    assert receiver.heard[0].headers["content-type"] == "application/json"
    assert receiver.heard[0].body["event"] == "job.completed"
    assert [at for at, _, _ in outbox.tries] == [0.0, 1.0, 3.0]


def test_a_webhook_without_a_secret_has_no_signature_and_no_key_of_ours(
    receiver: Receiver, project: tuple[str, FunctionsState]
) -> None:
    service = Service(project[0], KEY, SECRET, verify=TLS)
    both = Sender(service, PinnedHttp(Addresses(frozenset({receiver.origin})), verify=TLS))

    found = both.send(webhook(f"{receiver.url}/hook", facts("job-a")), NOW)

    assert found == Delivered(200)
    headers = receiver.heard[0].headers
    assert not {"x-webhook-signature", "x-callback-signature", "authorization", "apikey"} & (
        headers.keys()
    )
    assert KEY not in str(headers)
    service.close()


@pytest.mark.parametrize(
    "url", ["http://127.0.0.1:1/x", "http://10.0.0.1/x", "http://[::1]/x", "file:///etc/passwd"]
)
def test_a_webhook_to_an_address_inside_is_an_alarm_and_is_not_sent(
    pinned: Sender, url: str
) -> None:
    found = pinned.send(webhook(url, facts("job-a")), NOW)

    assert isinstance(found, Alarm)
    assert found.reason.startswith("not sent")


def test_a_redirect_of_a_webhook_is_not_followed(pinned: Sender, receiver: Receiver) -> None:
    receiver.answers["/hook"] = [307]
    receiver.headers["Location"] = f"{receiver.url}/elsewhere"

    found = pinned.send(webhook(f"{receiver.url}/hook", facts("job-a")), NOW)

    assert found == Alarm("answered 307")
    assert [heard.path for heard in receiver.heard] == ["/hook"]


def test_a_webhook_that_hangs_takes_no_longer_than_its_limit(
    pinned: Sender, receiver: Receiver, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(deliver, "WEBHOOK_TIMEOUT_S", 0.2)

    found = pinned.send(webhook(f"{receiver.url}/hang", facts("job-a")), NOW)

    assert isinstance(found, Again)
    assert found.after_s is None  # the next try comes by our own pace
    receiver.let_go.set()


def test_events_of_a_job_arrive_in_order_whatever_its_receiver_does(
    pinned: Sender, receiver: Receiver
) -> None:
    receiver.answers |= {"/a": [500, 503, 200, 429, 500, 200], "/b": [200, 500, 500, 200]}
    deliveries = [
        webhook(f"{receiver.url}/{job}", facts(job, status), sequence, id=10 * sequence)
        for sequence, status in ((2, Status.COMPLETED), (1, Status.PROCESSING))
        for job in ("a", "b")
    ]
    outbox = Outbox(pinned, deliveries, 1e6)

    outbox.run()

    for path in ("/a", "/b"):
        taken = [heard.body["event"] for heard in receiver.taken if heard.path == path]
        assert taken == ["job.processing", "job.completed"]
    assert outbox.waiting == outbox.dead == []


def test_a_receiver_that_is_not_there_holds_up_nobody_else(
    pinned: Sender, receiver: Receiver
) -> None:
    gone = [webhook("http://10.1.2.3/x", facts(f"gone-{n}"), id=n) for n in range(5)]
    fine = [webhook(f"{receiver.url}/ok", facts(f"fine-{n}"), id=9 + n) for n in range(3)]
    outbox = Outbox(pinned, [*gone, *fine], give_up_after_s=3000.0)

    outbox.run()

    assert [at for at, one, _ in outbox.tries if one.job_id.startswith("fine")] == [0.0] * 3
    assert {one.job_id for one in outbox.dead} == {one.job_id for one in gone}
    assert outbox.waiting == []


def test_a_dead_letter_lets_the_next_event_of_its_job_pass(
    pinned: Sender, receiver: Receiver
) -> None:
    receiver.answers["/a"] = [500] * LEAST_TRIES
    first = webhook(f"{receiver.url}/a", facts("a", Status.PROCESSING), 1)
    second = webhook(f"{receiver.url}/a", facts("a"), 2)
    outbox = Outbox(pinned, [first, second], give_up_after_s=2.0)

    outbox.run()

    assert [one.sequence for one in outbox.dead] == [1]
    assert [heard.body["event"] for heard in receiver.taken] == ["job.completed"]


def test_a_beginning_that_nobody_heard_is_void_once_the_end_is_known(
    pinned: Sender, receiver: Receiver
) -> None:
    receiver.answers["/a"] = [500]
    outbox = Outbox(pinned, [webhook(f"{receiver.url}/a", facts("a", Status.PROCESSING), 1)], 1e6)
    outbox.run(until_s=0.0)

    outbox.tell(webhook(f"{receiver.url}/a", facts("a"), 2))
    outbox.tell(webhook(f"{receiver.url}/b", facts("b", Status.PROCESSING), 1))
    outbox.run()

    told = sorted((heard.path, heard.body["event"]) for heard in receiver.taken)
    assert told == [("/a", "job.completed"), ("/b", "job.processing")]
