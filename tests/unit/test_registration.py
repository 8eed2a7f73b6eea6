"""When the ports are registered, and what happens when the functions for it lie, hang or fail."""

from __future__ import annotations

import logging
import ssl
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.supabase_functions import Cut, FunctionsState, Hang, Say, running_functions
from worker.errors import ConfigError
from worker.jobs import registration as registration_module
from worker.jobs.announce import (
    CHAT,
    CHECK_EVERY_S,
    MAX_RETRY_S,
    MEDIA,
    PROBE_EVERY_S,
    REGISTER_EVERY_S,
    Action,
    CheckHealth,
    Port,
    Probe,
    Register,
    State,
    checked,
    drained,
    due,
    not_checked,
    not_registered,
    probed,
    registered,
    with_urls,
)
from worker.jobs.registration import Registration, public_urls, registration_from_environment
from worker.storage.rows import JobRows, RowsUnavailable
from worker.storage.service import Service, service_from_environment

URLS = {
    CHAT: "https://pod1-7861.proxy.runpod.net",
    MEDIA: "https://pod1-7860.proxy.runpod.net",
}
PORTS = {CHAT: 7861, MEDIA: 7860}
CHAT_FUNCTION, MEDIA_FUNCTION = "register-chat-worker", "update-worker-url"
CHECK_FUNCTION = "health-check-workers"
TLS = ssl.create_default_context()  # made once: it takes longer than a test


# --- decisions ---------------------------------------------------------------------------------


def known(**changes: Any) -> Port:
    """A port that was just looked at, at 100 s, and answers."""
    usual: dict[str, Any] = {"answers": True, "probe_at": 100.0 + PROBE_EVERY_S}
    return Port(CHAT, URLS[CHAT], **{**usual, **changes})


def test_a_port_is_looked_at_before_it_is_registered() -> None:
    state = with_urls(State(()), URLS)

    assert due(state, 100.0) == [Probe(CHAT), Probe(MEDIA)]
    state = probed(probed(state, CHAT, True, 100.0), MEDIA, False, 100.0)
    assert due(state, 100.5) == [Register(CHAT)]


def test_a_port_that_does_not_answer_is_looked_at_sooner() -> None:
    state = State((known(probe_at=100.0),))

    there, away = (probed(state, CHAT, answers, 100.0).port(CHAT) for answers in (True, False))

    assert (there.probe_at, away.probe_at) == (105.0, 101.0)


def test_a_registration_is_followed_by_a_check_at_once_and_every_minute() -> None:
    state = registered(State((known(),)), CHAT, 100.0)

    assert due(state, 100.5) == [CheckHealth()]
    state = checked(state, 100.5)
    assert due(state, 104.0) == []
    assert CheckHealth() in due(state, 100.5 + CHECK_EVERY_S)


def test_nothing_is_checked_before_anything_is_registered() -> None:
    assert due(State((known(answers=False),)), 100.0) == []


@pytest.mark.parametrize(
    ("port", "wanted"),
    [
        (known(registered_at=99.0), []),
        (known(registered_at=100.0 - REGISTER_EVERY_S), [Register(CHAT)]),
        (known(registered_at=None, register_at=101.0), []),
        (known(registered_at=None, register_at=100.0), [Register(CHAT)]),
        (known(registered_at=None, answers=False), []),
        (known(registered_at=None, probe_at=100.0), [Probe(CHAT)]),  # the look is too old
    ],
)
def test_a_port_is_registered_when_it_is_due(port: Port, wanted: list[Action]) -> None:
    assert due(State((port,)), 100.0) == wanted


def test_a_port_that_was_away_is_registered_again_and_its_absence_is_told_at_once() -> None:
    state = State((known(registered_at=99.0),), check_at=150.0)

    state = probed(state, CHAT, False, 100.0)
    assert due(state, 100.0) == [CheckHealth()]
    state = probed(checked(state, 100.0), CHAT, True, 101.0)
    assert due(state, 101.0) == [Register(CHAT)]


def test_another_public_address_is_registered_and_the_same_one_is_not() -> None:
    state = State((known(registered_at=99.0),))

    assert with_urls(state, {CHAT: URLS[CHAT]}) == state
    moved = with_urls(state, {CHAT: "https://elsewhere"})
    assert due(moved, 100.0) == [Register(CHAT)]
    assert moved.port(CHAT).url == "https://elsewhere"
    assert with_urls(state, {}).ports == ()


@given(st.integers(0, 2000), st.floats(0, 1))
def test_a_refused_registration_is_tried_again_within_a_minute(
    failures: int, random01: float
) -> None:
    state = State((known(failures=failures),))

    state = not_registered(state, CHAT, 100.0, random01)

    assert 0 < state.port(CHAT).register_at - 100.0 <= MAX_RETRY_S
    assert state.port(CHAT).failures == failures + 1
    check = not_checked(replace(state, check_failures=failures), 100.0, random01)
    assert check.check_at is not None
    assert 0 < check.check_at - 100.0 <= MAX_RETRY_S


def test_a_drain_registers_nothing_and_signs_off_once_no_port_answers() -> None:
    state = State(tuple(Port(role, url, True, 110.0) for role, url in URLS.items()))

    state = drained(state, 100.0)
    assert due(state, 100.0) == [Probe(CHAT), Probe(MEDIA)]
    state = probed(state, CHAT, False, 100.0)
    assert CheckHealth() not in due(state, 100.5)
    state = probed(state, MEDIA, False, 100.0)
    assert due(state, 100.5) == [CheckHealth()]
    state = checked(state, 100.5)
    assert state.signed_off
    assert due(state, 1e6) == []


def test_a_port_that_still_answers_during_a_drain_is_not_registered_any_more() -> None:
    new = drained(State((known(),)), 100.0)

    state = probed(new, CHAT, True, 100.0)

    assert due(state, 100.5) == []


def test_a_drain_takes_no_old_look_at_a_port_for_a_refusal() -> None:
    away = State((known(answers=False),))

    assert due(drained(away, 100.0), 100.0) == [Probe(CHAT)]


def test_a_sign_off_that_failed_is_tried_again() -> None:
    state = probed(drained(State((known(),)), 100.0), CHAT, False, 100.0)

    state = not_checked(state, 100.5, 0.5)

    assert not state.signed_off
    assert CheckHealth() not in due(state, 101.0)
    assert CheckHealth() in due(state, 101.5)


COURSE = st.lists(
    st.tuples(st.sampled_from([0.5, 1.0, 5.0, 61.0]), st.booleans(), st.booleans()), max_size=60
)


@given(COURSE)
def test_whatever_happens_a_port_is_registered_only_right_after_it_answered(
    course: list[tuple[float, bool, bool]],
) -> None:
    now, state = 0.0, with_urls(State(()), {CHAT: URLS[CHAT]})
    looked_at, answered = -1.0, False

    for step_s, answers, works in course:
        now += step_s
        for action in due(state, now):
            match action:
                case Probe():
                    looked_at, answered = now, answers
                    state = probed(state, CHAT, answers, now)
                case Register():
                    assert answered
                    assert now - looked_at < PROBE_EVERY_S
                    state = (
                        registered(state, CHAT, now)
                        if works
                        else not_registered(state, CHAT, now, 0.5)
                    )
                case CheckHealth():
                    state = checked(state, now) if works else not_checked(state, now, 0.5)


# --- with the functions ------------------------------------------------------------------------


class Pod:
    """A registration with a clock by hand and ports that answer or not."""

    def __init__(self, url: str, state: FunctionsState):
        self.functions = state
        self.now = 1000.0
        self.up = {port: True for port in PORTS.values()}  # as seen from inside
        self.reached = {public: True for public in URLS.values()}  # from outside
        self.urls = dict(URLS)
        state.probe = lambda public: (self.reached.get(public, False), 1.0)
        self.registration = Registration(
            Service(url, state.service_key, verify=TLS),
            lambda: self.urls,
            PORTS,
            probe=lambda port: self.up[port],
            wall_clock=lambda: 1_760_000_000.25,
            random01=lambda: 0.5,
        )

    def tick(self, seconds: float = 0.5, times: int = 1) -> None:
        for _ in range(times):
            self.registration.tick(self.now)
            self.now += seconds

    def names(self) -> list[str]:
        """Functions that were called since the last look."""
        names = [call.function for call in self.functions.calls]
        self.functions.calls.clear()
        return names


@pytest.fixture(scope="module")
def project() -> Iterator[tuple[str, FunctionsState]]:
    state = FunctionsState()
    with running_functions(state) as url:
        yield url, state


@pytest.fixture
def functions(project: tuple[str, FunctionsState]) -> FunctionsState:
    """The project, as new."""
    _, state = project
    for kept in (state.config, state.calls, state.faults, state.jobs):
        kept.clear()
    state.let_go.clear()
    return state


@pytest.fixture
def pod(project: tuple[str, FunctionsState], functions: FunctionsState) -> Iterator[Pod]:
    one = Pod(project[0], functions)
    yield one
    functions.let_go.set()
    one.registration.close()


def test_both_ports_are_registered_as_the_functions_read_it(pod: Pod) -> None:
    pod.tick(times=3)

    assert pod.functions.config["chatWorkerUrl"] == URLS[CHAT]
    assert pod.functions.config["workerUrl"] == URLS[MEDIA]
    assert pod.functions.config["worker_status"] == "active"
    chat, media = pod.functions.calls[:2]
    assert chat.headers["authorization"] == "Bearer service-key"
    assert chat.body == {
        "worker_url": URLS[CHAT],
        "auto_registered": True,
        "registration_method": "pure_inference_chat_worker",
        "worker_type": "pure_inference_engine",
        "capabilities": {
            "hardcoded_prompts": False,
            "prompt_modification": False,
            "pure_inference": True,
        },
        "timestamp": "2025-10-09T08:53:20.250Z",
    }
    assert media.body == {
        "worker_url": URLS[MEDIA],
        "auto_registered": True,
        "registration_method": "wan_worker_self_registration",
        "detection_method": "RUNPOD_POD_ID",
        "timestamp": "2025-10-09T08:53:20.250Z",
    }


def test_after_the_registration_the_health_has_the_address_that_a_caller_looks_for(
    pod: Pod,
) -> None:
    pod.tick(times=3)

    cached = pod.functions.config["workerHealthCache"]
    assert cached["chatWorker"]["workerUrl"] == URLS[CHAT]
    assert cached["chatWorker"]["isHealthy"] is True
    assert pod.names() == [CHAT_FUNCTION, MEDIA_FUNCTION, CHECK_FUNCTION]


def test_the_health_is_checked_every_minute_and_the_addresses_every_ten(pod: Pod) -> None:
    pod.tick(times=3)
    pod.names()

    pod.tick(times=2 * 1200)  # twenty minutes

    names = pod.names()
    assert names.count(CHAT_FUNCTION) == names.count(MEDIA_FUNCTION) == 2
    assert 20 <= names.count(CHECK_FUNCTION) <= 24


def test_no_port_is_registered_before_it_answers(pod: Pod) -> None:
    pod.up[PORTS[MEDIA]] = False

    pod.tick(times=20)
    assert MEDIA_FUNCTION not in pod.names()
    pod.up[PORTS[MEDIA]] = True
    pod.tick(times=4)

    assert pod.functions.config["workerUrl"] == URLS[MEDIA]


def test_a_port_that_is_not_yet_reached_from_outside_is_tried_again_later_and_later(
    pod: Pod,
) -> None:
    """update-worker-url answers 400 and stores nothing until the pod's proxy knows the port."""
    pod.reached[URLS[MEDIA]] = False

    pod.tick(times=2 * 30)
    refused = pod.names().count(MEDIA_FUNCTION)
    assert 4 <= refused <= 6  # after 1, 2, 4, 8 … s
    assert "workerUrl" not in pod.functions.config
    pod.reached[URLS[MEDIA]] = True
    pod.tick(times=2 * 65)

    assert pod.functions.config["workerUrl"] == URLS[MEDIA]


def test_a_port_that_was_away_is_seen_as_such_and_is_registered_when_it_is_back(pod: Pod) -> None:
    pod.tick(times=3)
    pod.names()

    pod.up[PORTS[CHAT]] = pod.reached[URLS[CHAT]] = False
    pod.tick(times=14)
    assert pod.names() == [CHECK_FUNCTION]
    assert pod.functions.config["workerHealthCache"]["chatWorker"]["isHealthy"] is False
    pod.up[PORTS[CHAT]] = pod.reached[URLS[CHAT]] = True
    pod.tick(times=6)

    assert pod.names() == [CHAT_FUNCTION, CHECK_FUNCTION]
    assert pod.functions.config["workerHealthCache"]["chatWorker"]["isHealthy"] is True


def test_another_public_address_is_registered_at_once(pod: Pod) -> None:
    pod.tick(times=3)
    pod.names()

    pod.urls[CHAT] = "https://pod2-7861.proxy.runpod.net"
    pod.reached["https://pod2-7861.proxy.runpod.net"] = True
    pod.tick(times=3)

    assert CHAT_FUNCTION in pod.names()
    assert pod.functions.config["chatWorkerUrl"] == "https://pod2-7861.proxy.runpod.net"


LIES = [
    Say(500, '{"error": "boom"}'),
    Say(400, '{"success": false, "error": "no"}'),
    Say(401, '{"code": 401}'),
    Say(200, '{"success": false}'),
    Say(200, '{"success": "true"}'),
    Say(200, "null"),
    Say(200, "<html>it works</html>"),
    Say(200, "[" * 50_000),
    Say(200, ""),
    Say(204),
    Say(302, "", {"Location": "http://127.0.0.1:1/"}),
    Cut(),
    Say(200, '{"success": true, "workerUrl": "https://other", "worker_url": "https://other"}'),
    Say(200, '{"success": true, "pad": "' + "x" * 100_000 + '"}'),
]


@pytest.mark.parametrize("lie", LIES)
def test_a_function_that_does_not_say_that_it_has_stored_us_is_asked_again(
    pod: Pod, lie: Say | Cut
) -> None:
    pod.functions.script(CHAT_FUNCTION, lie)
    pod.functions.script(MEDIA_FUNCTION, lie, lie)

    pod.tick(times=12)

    assert pod.functions.config["chatWorkerUrl"] == URLS[CHAT]
    assert pod.functions.config["workerUrl"] == URLS[MEDIA]
    names = pod.names()
    assert names.count(CHAT_FUNCTION) == 2
    assert names.count(MEDIA_FUNCTION) == 3


@pytest.mark.parametrize("lie", LIES[:-2])
def test_a_check_that_went_wrong_is_made_again(pod: Pod, lie: Say | Cut) -> None:
    pod.functions.script(CHECK_FUNCTION, lie)

    pod.tick(times=6)

    assert pod.functions.config["workerHealthCache"]["chatWorker"]["workerUrl"] == URLS[CHAT]
    assert pod.names().count(CHECK_FUNCTION) == 2


def test_a_call_whose_answer_was_lost_is_made_again(pod: Pod) -> None:
    pod.functions.script(CHAT_FUNCTION, Cut(done=True))

    pod.tick(times=6)

    assert pod.names().count(CHAT_FUNCTION) == 2
    assert pod.functions.config["chatWorkerUrl"] == URLS[CHAT]


def test_a_function_that_hangs_holds_up_one_round_and_no_port(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "CALL_TIMEOUT_S", 0.1)
    pod.functions.script(CHAT_FUNCTION, Hang())

    pod.tick(times=2)
    assert pod.functions.config["workerUrl"] == URLS[MEDIA]
    assert "chatWorkerUrl" not in pod.functions.config
    pod.functions.let_go.set()
    pod.tick(times=4)

    assert pod.functions.config["chatWorkerUrl"] == URLS[CHAT]


def test_a_project_that_is_away_is_tried_again(pod: Pod) -> None:
    """Nothing listens where the address points to: the connection is refused."""
    away = Pod("http://127.0.0.1:1", pod.functions)

    away.tick(times=10)

    assert away.registration.state.port(CHAT).failures >= 2
    assert away.registration.state.port(CHAT).registered_at is None
    away.registration.close()


def test_what_is_wrong_is_logged_once_and_so_is_its_end(
    pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    pod.reached[URLS[MEDIA]] = False

    with caplog.at_level(logging.INFO, "worker.jobs.registration"):
        pod.tick(times=2 * 30)
        pod.reached[URLS[MEDIA]] = True
        pod.tick(times=2 * 65)

    lines = [record.getMessage() for record in caplog.records if "media port is" in record.message]
    assert lines == [
        "the media port is not registered: update-worker-url answered 400 without success",
        f"the media port is registered as {URLS[MEDIA]}",
    ]


def test_a_port_that_the_service_does_not_reach_is_told_to_the_operator(
    pod: Pod, caplog: pytest.LogCaptureFixture
) -> None:
    """register-chat-worker stores an address even if nobody can reach it."""
    pod.reached[URLS[CHAT]] = False

    with caplog.at_level(logging.WARNING, "worker.jobs.registration"):
        pod.tick(times=3)

    assert f"the service does not reach the chat port at {URLS[CHAT]}" in caplog.text


def test_a_drain_signs_off_when_both_ports_refuse(pod: Pod) -> None:
    pod.tick(times=3)
    pod.names()

    pod.registration.drain()
    pod.tick(times=4)
    assert pod.names() == []  # they still answer
    assert not pod.registration.wait_signed_off(0)
    for port in PORTS.values():
        pod.up[port] = False
    for public in URLS.values():
        pod.reached[public] = False
    pod.tick(times=4)

    assert pod.names() == [CHECK_FUNCTION]
    assert pod.registration.wait_signed_off(0)
    health = pod.functions.config["workerHealthCache"]
    assert [health[name]["isHealthy"] for name in ("chatWorker", "wanWorker")] == [False, False]
    # The addresses stay: there is no function that takes them back.
    assert pod.functions.config["chatWorkerUrl"] == URLS[CHAT]
    pod.tick(times=2 * 700)
    assert pod.names() == []


def test_the_thread_signs_off_when_the_ports_refuse(
    pod: Pod, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(registration_module, "TICK_S", 0.01)
    for port in PORTS.values():
        pod.up[port] = False
    pod.registration.start()
    pod.registration.drain()

    assert pod.registration.wait_signed_off(10)
    assert pod.names() == [CHECK_FUNCTION]


def test_the_local_probe_wants_200_and_nothing_else(
    project: tuple[str, FunctionsState], functions: FunctionsState
) -> None:
    """The stand-in's own port has no /health: 404 is no answer; neither is a closed port."""
    url, _ = project
    registration = Registration(Service(url, "service-key", verify=TLS), lambda: URLS, PORTS)

    port = int(url.rpartition(":")[2])
    answers = registration._answers(port), registration._answers(1)

    assert answers == (False, False)
    registration.close()


# --- settings ----------------------------------------------------------------------------------

SUPABASE = {"SUPABASE_URL": "https://project.supabase.co", "SUPABASE_SERVICE_KEY": "key"}


def test_addresses_come_from_the_pods_id_or_are_given_and_are_never_guessed() -> None:
    assert public_urls({"HOSTNAME": "longhostname-7f9"}, 7861, 7860) == {}
    assert public_urls({"RUNPOD_POD_ID": " pod1 "}, 7861, 7860) == URLS
    assert public_urls({"VERBATIM_PUBLIC_MEDIA_URL": "https://m.example/"}, 7861, 7860) == {
        MEDIA: "https://m.example"
    }
    mixed = {"RUNPOD_POD_ID": "pod1", "VERBATIM_PUBLIC_CHAT_URL": "https://c.example"}
    assert public_urls(mixed, 7861, 9000) == {
        CHAT: "https://c.example",
        MEDIA: "https://pod1-9000.proxy.runpod.net",
    }


@pytest.mark.parametrize(
    "env",
    [
        {"RUNPOD_POD_ID": "pod/../x"},
        {"VERBATIM_PUBLIC_CHAT_URL": "c.example"},
        {"VERBATIM_PUBLIC_CHAT_URL": "ftp://c.example"},
    ],
)
def test_what_cannot_be_an_address_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError):
        registration_from_environment(SUPABASE | env, 7861, 7860)


@pytest.mark.parametrize(
    "env", [{}, SUPABASE, {"RUNPOD_POD_ID": "pod1"}, {"SUPABASE_URL": " ", "RUNPOD_POD_ID": "pod1"}]
)
def test_registration_is_off_unless_a_project_and_an_address_are_configured(
    env: dict[str, str],
) -> None:
    assert registration_from_environment(env, 7861, 7860) is None


@pytest.mark.parametrize("name", ["SUPABASE_SERVICE_KEY", "SUPABASE_SERVICE_ROLE_KEY"])
def test_either_name_of_the_service_key_is_taken(name: str) -> None:
    env = {"SUPABASE_URL": "https://project.supabase.co", name: "key", "RUNPOD_POD_ID": "pod1"}

    registration = registration_from_environment(env, 7861, 7860)

    assert registration is not None
    registration.close()


@pytest.mark.parametrize(
    "env", [{"SUPABASE_URL": "https://project.supabase.co"}, {"SUPABASE_SERVICE_KEY": "key"}]
)
def test_half_a_project_is_refused(env: dict[str, str]) -> None:
    with pytest.raises(ConfigError, match="missing"):
        service_from_environment(env)


def test_the_callback_secret_belongs_to_the_project() -> None:
    service = service_from_environment(SUPABASE | {"JOB_CALLBACK_SECRET": " hush "})

    assert service is not None
    assert service.callback_secret == "hush"
    service.close()


# --- rows --------------------------------------------------------------------------------------


@pytest.fixture
def rows(project: tuple[str, FunctionsState], functions: FunctionsState) -> Iterator[JobRows]:
    service = Service(project[0], functions.service_key, verify=TLS)
    yield JobRows(service)
    functions.let_go.set()
    service.close()


def test_a_rows_status_is_read(rows: JobRows, functions: FunctionsState) -> None:
    job = functions.add_job(status="cancelled")

    assert rows.status(job) == "cancelled"
    assert functions.calls[0].headers["apikey"] == "service-key"


@pytest.mark.parametrize(
    "job", ["0b6f3c0a-3d5a-4a53-9c55-0f2a4c8b7e11", "my-own-id", "a&status=eq.queued", "a b/é%"]
)
def test_a_job_without_a_row_is_missing_whatever_its_id_is(
    rows: JobRows, functions: FunctionsState, job: str
) -> None:
    functions.add_job()

    assert rows.status(job) is None
    rows.mark_processing(job, 1_760_000_000.0)
    assert [row["status"] for row in functions.jobs.values()] == ["queued"]


def test_what_stands_in_an_id_is_never_read_as_a_condition(
    rows: JobRows, functions: FunctionsState
) -> None:
    job = functions.add_job()

    for other in (f"{job}&status=eq.queued", f"{job}&x=eq.y", f"{job}#"):
        assert rows.status(other) is None
        rows.mark_processing(other, 1_760_000_000.0)

    assert functions.jobs[job]["status"] == "queued"


@pytest.mark.parametrize("before", ["queued", "processing", "completed", "failed", "cancelled"])
def test_only_a_row_that_waits_is_marked_as_processed(
    rows: JobRows, functions: FunctionsState, before: str
) -> None:
    job = functions.add_job(status=before)

    rows.mark_processing(job, 1_760_000_000.25)

    row = functions.jobs[job]
    if before == "queued":
        assert (row["status"], row["started_at"]) == ("processing", "2025-10-09T08:53:20.250+00:00")
    else:
        assert (row["status"], row["started_at"]) == (before, None)
    assert row["completed_at"] is None


@pytest.mark.parametrize(
    "lie",
    [
        Say(500, "boom"),
        Say(500, "[]"),
        Say(503, '[{"status": "queued"}]'),
        Say(401, '{"message": "no"}'),
        Say(400, '{"code": "PGRST100"}'),
        Say(302, "", {"Location": "http://127.0.0.1:1/"}),
        Cut(),
    ],
)
@pytest.mark.parametrize(
    "call", [lambda rows, job: rows.status(job), lambda rows, job: rows.mark_processing(job, 0.0)]
)
def test_a_table_that_does_not_answer_is_an_error_and_never_a_missing_row(
    rows: JobRows,
    functions: FunctionsState,
    lie: Say | Cut,
    call: Callable[[JobRows, str], Any],
) -> None:
    job = functions.add_job()
    functions.script("jobs", lie)

    with pytest.raises(RowsUnavailable) as raised:
        call(rows, job)

    assert raised.value.retry_after_s == 5.0


@pytest.mark.parametrize(
    "text", ["", "null", "{}", '[{"status": 1}]', '[{"status": null}]', "[[]", "[1, 2]", "[" * 9000]
)
def test_an_answer_of_another_form_is_an_error_and_never_a_missing_row(
    rows: JobRows, functions: FunctionsState, text: str
) -> None:
    functions.script("jobs", Say(200, text))

    with pytest.raises(RowsUnavailable):
        rows.status(functions.add_job())


def test_an_answer_that_breaks_off_is_never_a_missing_row(
    rows: JobRows, functions: FunctionsState
) -> None:
    functions.script("jobs", Say(200, "[]", {"Content-Length": "30"}))

    with pytest.raises(RowsUnavailable):
        rows.status(functions.add_job())
