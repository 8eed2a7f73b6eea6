"""What is known of one child, how it is started, and what is said about its end."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from worker.config import KEY_NAMES, REPOSITORY, load_settings, profile_names
from worker.lifeline import PARENT_VARIABLE
from worker.protocol.messages import ModelState, State
from worker.supervisor.check import choose_profile
from worker.supervisor.child import (
    NO_RESTART,
    QUICK_FAILURES,
    Child,
    ChildSpec,
    exit_text,
    restart_delay,
)
from worker.supervisor.logs import ChildLogs, pick_cause
from worker.supervisor.spawn import Spawner, child_environment, child_specs
from worker.vram.probe import Card

FRONT = ChildSpec("front chat", ("-c", "print('hello from a child')"), port=7861)
ENGINE = ChildSpec("engine chat", ("-c", "print('hello from a child')"))


class FakeProcess:
    pid = 42

    def poll(self) -> int | None:
        return None

    def terminate(self) -> None:
        raise AssertionError("nobody asked for this")

    kill = terminate


def child(spec: ChildSpec = FRONT, **now: Any) -> Child:
    made = Child(spec)
    for name, value in now.items():
        assert hasattr(made, name)
        setattr(made, name, value)
    return made


def state(status: str = "ready", **more: Any) -> State:
    return State(name="front chat", pid=42, started_at=0.0, status=status, **more)


# --- one child ---------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("now", "word"),
    [
        ({}, "waiting"),
        ({"process": FakeProcess()}, "starting"),
        ({"process": FakeProcess(), "state": state("loading")}, "loading"),
        ({"process": FakeProcess(), "state": state("ready")}, "ready"),
        ({"process": FakeProcess(), "state": state("draining")}, "draining"),
        ({"failures": QUICK_FAILURES - 1}, "waiting"),
        ({"failures": QUICK_FAILURES}, "failed"),
        ({"failures": QUICK_FAILURES, "process": FakeProcess()}, "starting"),
        ({"given_up": True}, "failed"),
        ({"terminated_at": 5.0}, "stopped"),
        ({"terminated_at": 5.0, "given_up": True}, "failed"),
    ],
)
def test_a_childs_status_is_one_word(now: dict[str, Any], word: str) -> None:
    assert child(**now).status() == word


@pytest.mark.parametrize(
    ("now", "seconds"),
    [
        ({"start_at": 108.0}, 8.0),
        ({"start_at": 90.0}, 0.0),
        ({"start_at": 108.0, "process": FakeProcess()}, None),
        ({"start_at": 108.0, "given_up": True}, None),
        ({"start_at": 108.0, "terminated_at": 99.0}, None),
    ],
)
def test_the_next_try_is_known_while_there_will_be_one(
    now: dict[str, Any], seconds: float | None
) -> None:
    assert child(**now).next_try_s(100.0) == seconds


def test_a_report_has_what_a_person_wants_to_know() -> None:
    loaded = ModelState(id="m", kind="chat", status="loaded", display_name="M")
    running = child(process=FakeProcess(), state=state(models=(loaded,)), started_at=90.0)

    report = running.report(100.0, rss_bytes=7)

    assert (report.name, report.pid, report.status) == ("front chat", 42, "ready")
    assert (report.port, report.models, report.rss_bytes) == (7861, ("m: loaded",), 7)
    assert (report.uptime_s, report.next_try_s) == (10.0, None)


def test_a_report_of_a_child_that_is_down_has_its_cause_and_no_pid() -> None:
    down = child(failures=2, cause="exited with code 1", start_at=102.0, started_at=90.0)

    report = down.report(100.0, rss_bytes=0)

    assert (report.pid, report.uptime_s) == (None, 0.0)
    assert (report.failures, report.cause, report.next_try_s) == (2, "exited with code 1", 2.0)


def test_engines_are_told_by_their_names() -> None:
    assert ENGINE.is_engine
    assert not FRONT.is_engine
    assert not ChildSpec("runner", ()).is_engine


@pytest.mark.parametrize(
    ("failures", "seconds"), [(1, 1), (2, 2), (3, 4), (6, 32), (7, 60), (8, 60), (10**6, 60)]
)
def test_the_delay_doubles_up_to_a_minute(failures: int, seconds: float) -> None:
    assert restart_delay(failures) == seconds


@pytest.mark.parametrize(
    ("code", "text"),
    [
        (0, "exited with code 0"),
        (70, "exited with code 70"),
        (-9, "was ended by SIGKILL"),
        (-11, "was ended by SIGSEGV"),
        (-250, "was ended by signal 250"),
    ],
)
def test_an_end_is_told_in_words(code: int, text: str) -> None:
    assert exit_text(code) == text


def test_gunicorns_two_codes_for_an_app_that_cannot_start_are_final() -> None:
    from gunicorn.arbiter import Arbiter

    assert {Arbiter.WORKER_BOOT_ERROR, Arbiter.APP_LOAD_ERROR} == NO_RESTART


# --- the cause in a log ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lines", "cause"),
    [
        ([], ""),
        (["all is well", ""], ""),
        (
            ["Traceback (most recent call last):", '  File "x.py"', "ValueError: no room", ""],
            "ValueError: no room",
        ),
        (["torch.OutOfMemoryError: no room"], "torch.OutOfMemoryError: no room"),
        (["SystemExit: 3"], "SystemExit: 3"),
        (
            ["2026-01-01T00:00:00.000Z CRITICAL engine chat [-] [daemon] device is wrong"],
            "[daemon] device is wrong",
        ),
        (["2026-01-01T00:00:00.000Z ERROR engine chat [r-1] it broke: twice"], "it broke: twice"),
        (["KeyError: 'first'", "later", "TypeError: second", "  frame"], "TypeError: second"),
        (["ValueError: old", "2026 ERROR engine [-] new", "2026 INFO engine [-] x"], "new"),
        (["Error: this value cannot be used"], "Error: this value cannot be used"),
        (["The Error is near", "https://example.org/Error", "Error"], "Error"),
        (["2026 INFO engine [-] no ERRORS were seen", "some text: it is an Error"], ""),
    ],
)
def test_the_cause_is_the_last_line_that_tells_of_an_error(lines: list[str], cause: str) -> None:
    assert pick_cause(lines) == cause


def test_a_cause_is_cut_to_what_fits_a_table() -> None:
    assert len(pick_cause([f"ValueError: {'x' * 10_000}"])) == 300


# --- starting ----------------------------------------------------------------------------------

SECRETS = (
    *KEY_NAMES,
    "SUPABASE_SERVICE_KEY",
    "SUPABASE_SERVICE_ROLE_KEY",
    "UPSTASH_REDIS_REST_TOKEN",
    "JOB_CALLBACK_SECRET",
    "HF_TOKEN",
)


def test_engines_get_no_secrets() -> None:
    environment = dict.fromkeys(SECRETS, "secret") | {"HOME": "/home/x"}

    given = child_environment(environment, is_engine=True)

    assert "secret" not in given.values()
    assert given["HOME"] == "/home/x"


def test_fronts_get_the_keys_that_they_check() -> None:
    given = child_environment(dict.fromkeys(SECRETS, "secret"), is_engine=False)

    assert all(given[name] == "secret" for name in KEY_NAMES)


@pytest.mark.parametrize("is_engine", [False, True])
def test_every_child_is_offline_and_knows_its_parent(is_engine: bool) -> None:
    environment = {"HF_HUB_OFFLINE": "0", "PYTHONPATH": "/elsewhere", PARENT_VARIABLE: "1"}

    given = child_environment(environment, is_engine=is_engine)

    assert given["HF_HUB_OFFLINE"] == given["TRANSFORMERS_OFFLINE"] == "1"
    assert given["PYTHONPATH"] == str(REPOSITORY)
    assert given[PARENT_VARIABLE] == str(os.getpid())


@pytest.mark.parametrize("is_engine", [False, True])
def test_every_child_gets_what_was_set_for_the_daemon(is_engine: bool) -> None:
    environment = {
        "VERBATIM_STATE_DIR": "/state",
        "VERBATIM_CHAT_PORT": "9001",
        "CUDA_VISIBLE_DEVICES": "1",
        "QWEN_INSTRUCT_PATH": "/models/qwen",
        "GOMP_SPINCOUNT": "7",
    }

    given = child_environment(environment, is_engine=is_engine)

    assert environment.items() <= given.items()


@pytest.mark.parametrize("is_engine", [False, True])
def test_no_child_spins_on_cores_that_others_need(is_engine: bool) -> None:
    given = child_environment({}, is_engine=is_engine)

    assert int(given["GOMP_SPINCOUNT"]) < 100_000  # what libgomp would do by itself is far more


def test_the_daemons_own_environment_is_left_as_it_was() -> None:
    environment = {"HF_TOKEN": "secret"}

    child_environment(environment, is_engine=True)

    assert environment == {"HF_TOKEN": "secret"}


def test_a_profile_is_fronts_runner_engines_and_gateway_with_the_ports_first() -> None:
    settings = load_settings("demo", {"VERBATIM_CHAT_PORT": "9001"})

    specs = child_specs(settings)

    assert [(spec.name, spec.port) for spec in specs] == [
        ("front chat", 9001),
        ("front media", 7860),
        ("runner", None),
        ("engine chat", None),
        ("engine media", None),
        ("gateway", 7862),
    ]
    assert all(spec.arguments[-2:] == ("--profile", str(settings.profile_path)) for spec in specs)


def test_a_childs_output_goes_to_the_log_of_its_name(tmp_path: Path) -> None:
    logs = ChildLogs(tmp_path / "logs")

    for _ in range(2):
        assert Spawner(logs, os.environ)(FRONT).wait(timeout=30) == 0
        logs.close()

    assert logs.path("front chat") == tmp_path / "logs" / "front-chat.log"
    assert logs.path("front chat").read_text() == "hello from a child\n" * 2


def test_a_child_is_in_a_session_of_its_own_so_that_ctrl_c_is_not_for_it(tmp_path: Path) -> None:
    code = "import os; print(os.getsid(0) == os.getpid())"
    logs = ChildLogs(tmp_path / "logs")

    Spawner(logs, os.environ)(ChildSpec("engine chat", ("-c", code))).wait(timeout=30)

    logs.close()
    assert logs.path("engine chat").read_text() == "True\n"


# --- the profile that fits ---------------------------------------------------------------------


@pytest.mark.parametrize(
    ("mebibytes", "profile"),
    [
        (81_559, "gpu-80gb"),  # H100 80GB, as nvidia-smi shows it
        (81_920, "gpu-80gb"),  # A100 80GB
        (49_140, "gpu-48gb"),  # RTX 6000 Ada
        (46_068, "gpu-48gb"),  # L40S with ECC
        (24_564, "gpu-24gb"),  # RTX 4090
        (23_028, "gpu-24gb"),  # A10 with ECC
        (16_380, "demo"),
        (8_192, "demo"),
    ],
)
def test_a_card_gets_the_profile_of_its_size(mebibytes: int, profile: str) -> None:
    assert choose_profile(Card("some card", mebibytes << 20)) == profile


def test_a_machine_without_a_card_gets_the_demo() -> None:
    assert choose_profile(None) == "demo"


@pytest.mark.parametrize("gib", [0, 23, 45, 80, 1000])
def test_every_profile_that_may_be_chosen_is_shipped(gib: int) -> None:
    assert choose_profile(Card("some card", gib << 30)) in profile_names()
