"""Keeping children alive and ending them in order, with fake processes and a clock by hand."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest

from worker.protocol.messages import (
    ChildReport,
    Drain,
    EngineNotice,
    Message,
    ModelState,
    State,
)
from worker.supervisor.child import Child, ChildSpec
from worker.supervisor.supervisor import Supervisor

ENGINE, FRONT = "engine chat", "front chat"
SPECS = (ChildSpec(ENGINE, ("engine",)), ChildSpec(FRONT, ("front",), port=7861))
GRACE_S, KILL_AFTER_S = 60.0, 10.0


class FakeProcess:
    """A process that ends when a test says so."""

    def __init__(self, pid: int):
        self.pid = pid
        self.code: int | None = None
        self.signals: list[str] = []

    def poll(self) -> int | None:
        return self.code

    def terminate(self) -> None:
        self.signals.append("TERM")

    def kill(self) -> None:
        self.signals.append("KILL")


class FakeWire:
    """Delivers what a test says children said; keeps what they are told."""

    def __init__(self) -> None:
        self.incoming: list[tuple[str, State | None]] = []
        self.sent: list[tuple[str, Message]] = []

    def receive(self) -> list[tuple[str, State | None]]:
        taken, self.incoming = self.incoming, []
        return taken

    def send(self, name: str, message: Message) -> None:
        self.sent.append((name, message))


class FakeStandIn:
    """Remembers on which ports it answers, and in what order it was asked to."""

    def __init__(self) -> None:
        self.open_ports: dict[int, Callable[[], ChildReport]] = {}

    def open(self, port: int, report: Callable[[], ChildReport]) -> None:
        self.open_ports.setdefault(port, report)

    def close(self, port: int) -> None:
        self.open_ports.pop(port, None)


class FakeMemory:
    """Keeps what it was told of engines, in order."""

    def __init__(self) -> None:
        self.told: list[tuple[str, str]] = []

    def began(self, name: str) -> None:
        self.told.append(("began", name))

    def ended(self, name: str, now: float) -> None:
        self.told.append(("ended", name))


class Bench:
    """A supervisor of one engine and one front, with everything around it by hand."""

    def __init__(self, specs: tuple[ChildSpec, ...] = SPECS) -> None:
        self.now = 1000.0
        self.wire = FakeWire()
        self.stand_in = FakeStandIn()
        self.started: list[tuple[str, float]] = []
        self.processes: dict[str, FakeProcess] = {}
        self.words: dict[str, str] = {}
        self.ports_open_at_start: list[set[int]] = []
        self.memory = FakeMemory()
        self.supervisor = Supervisor(
            specs,
            self._spawn,
            self.wire,
            self.stand_in,
            self.memory,
            lambda name: self.words.get(name, ""),
            GRACE_S,
            KILL_AFTER_S,
            lambda: self.now,
        )

    def _spawn(self, spec: ChildSpec) -> FakeProcess:
        process = FakeProcess(pid=100 + len(self.started))
        self.started.append((spec.name, self.now))
        self.processes[spec.name] = process
        self.ports_open_at_start.append(set(self.stand_in.open_ports))
        return process

    def child(self, name: str) -> Child:
        return next(child for child in self.supervisor.children if child.name == name)

    def tick(self, after_s: float = 0.0) -> None:
        self.now += after_s
        self.supervisor.tick(self.now)

    def settle(self) -> None:
        """Let what has happened be seen and acted upon."""
        for _ in range(3):
            self.tick(0.1)

    def says(self, name: str, status: str = "ready", **more: Any) -> None:
        """A child says how it is; heard in the next tick."""
        pid = self.processes[name].pid
        state = State(name=name, pid=pid, started_at=0.0, status=status, **more)
        self.wire.incoming.append((name, state))

    def begin(self) -> None:
        """Everything started and ready."""
        self.tick()
        for name in self.processes:
            self.says(name)
        self.tick()

    def end(self, name: str, code: int) -> None:
        self.processes[name].code = code

    def starts_of(self, name: str) -> list[float]:
        return [at for started, at in self.started if started == name]

    def told(self, name: str, kind: type[Message]) -> list[Message]:
        return [message for to, message in self.wire.sent if to == name and type(message) is kind]

    def fail_until_start(self, name: str, code: int = 1) -> float:
        """End a child and tick in small steps until it is started again; returns the wait."""
        self.end(name, code)
        self.tick()
        failed_at, starts = self.now, len(self.starts_of(name))
        while len(self.starts_of(name)) == starts and self.now < failed_at + 100:
            self.tick(0.25)
        return self.now - failed_at


# --- starting ----------------------------------------------------------------------------------


def test_the_first_tick_starts_every_child() -> None:
    bench = Bench()

    bench.tick()

    assert [name for name, _ in bench.started] == [ENGINE, FRONT]
    assert bench.supervisor.status() == "starting"


def test_a_running_child_is_not_started_again() -> None:
    bench = Bench()
    bench.begin()

    for _ in range(10):
        bench.tick(1.0)

    assert len(bench.started) == 2


def test_a_child_is_ready_by_its_own_word_and_not_by_time() -> None:
    bench = Bench()
    bench.tick()

    bench.tick(59.0)

    assert not bench.child(ENGINE).is_ready()
    bench.says(ENGINE, "loading")
    bench.tick()
    assert not bench.child(ENGINE).is_ready()
    bench.says(ENGINE, "ready")
    bench.tick()
    assert bench.child(ENGINE).is_ready()


def test_all_is_ready_when_every_child_is() -> None:
    bench = Bench()
    bench.tick()
    bench.says(ENGINE)
    bench.tick()
    assert bench.supervisor.status() == "starting"

    bench.says(FRONT)
    bench.tick()

    assert bench.supervisor.status() == "ready"


def test_the_last_words_of_a_child_that_has_ended_do_not_make_it_ready() -> None:
    bench = Bench()
    bench.begin()
    bench.end(ENGINE, 1)
    bench.tick()
    bench.says(ENGINE)

    bench.tick(0.1)

    assert not bench.child(ENGINE).is_ready()
    assert bench.child(ENGINE).state is None


def test_a_child_that_went_away_is_not_ready_until_it_speaks_again() -> None:
    bench = Bench()
    bench.begin()

    bench.wire.incoming.append((ENGINE, None))
    bench.tick()

    assert bench.child(ENGINE).status() == "starting"
    assert bench.supervisor.status() == "starting"
    bench.says(ENGINE)
    bench.tick()
    assert bench.supervisor.status() == "ready"


# --- restarting --------------------------------------------------------------------------------


def test_a_crashed_child_waits_before_it_is_restarted() -> None:
    bench = Bench()
    bench.begin()
    bench.end(ENGINE, -11)
    bench.tick()

    bench.tick(0.9)
    assert len(bench.starts_of(ENGINE)) == 1
    bench.tick(0.1)

    assert len(bench.starts_of(ENGINE)) == 2


def test_delays_grow_to_a_minute_and_no_further() -> None:
    bench = Bench()
    bench.tick()

    delays = [bench.fail_until_start(ENGINE) for _ in range(9)]

    assert delays == [1, 2, 4, 8, 16, 32, 60, 60, 60]


def test_another_child_keeps_running_meanwhile() -> None:
    bench = Bench()
    bench.begin()

    for _ in range(3):
        bench.fail_until_start(ENGINE)
        bench.says(FRONT)

    assert len(bench.starts_of(FRONT)) == 1
    assert bench.processes[FRONT].signals == []


def test_a_healthy_minute_forgets_the_failures() -> None:
    bench = Bench()
    bench.tick()
    for _ in range(3):
        bench.fail_until_start(ENGINE)
    bench.says(ENGINE)
    bench.tick()

    bench.tick(59.9)
    assert bench.child(ENGINE).failures == 3
    bench.says(ENGINE)
    bench.tick(0.1)

    assert bench.child(ENGINE).failures == 0
    assert bench.child(ENGINE).cause is None
    assert bench.fail_until_start(ENGINE) == 1


def test_a_minute_of_starting_forgets_nothing() -> None:
    bench = Bench()
    bench.tick()
    for _ in range(3):
        bench.fail_until_start(ENGINE)

    for _ in range(100):
        bench.says(ENGINE, "loading")
        bench.tick(1.0)

    assert bench.child(ENGINE).failures == 3


def test_a_child_that_is_ready_for_less_than_a_minute_each_time_waits_longer_each_time() -> None:
    bench = Bench()
    bench.tick()
    delays = []

    for _ in range(4):
        bench.says(ENGINE)
        bench.tick()
        bench.says(ENGINE)
        bench.tick(55.0)
        delays.append(bench.fail_until_start(ENGINE))

    assert delays == [1, 2, 4, 8]


def test_a_child_that_ends_with_success_is_restarted_too() -> None:
    bench = Bench()
    bench.begin()

    delay = bench.fail_until_start(FRONT, code=0)

    assert delay == 1


@pytest.mark.parametrize("code", [3, 4])
@pytest.mark.parametrize("name", [ENGINE, FRONT])
def test_a_child_that_says_that_trying_again_cannot_help_is_given_up(name: str, code: int) -> None:
    bench = Bench()
    bench.begin()
    bench.end(name, code)

    for _ in range(50):
        bench.tick(10.0)

    assert len(bench.starts_of(name)) == 1
    assert bench.child(name).status() == "failed"
    assert bench.child(name).next_try_s(bench.now) is None
    assert bench.supervisor.status() == "degraded"


def test_the_cause_is_how_it_ended_and_its_last_words() -> None:
    bench = Bench()
    bench.begin()
    bench.words[ENGINE] = "ModuleNotFoundError: No module named 'torch'"

    bench.end(ENGINE, 1)
    bench.tick()

    assert bench.child(ENGINE).cause == (
        "exited with code 1: ModuleNotFoundError: No module named 'torch'"
    )


def test_without_last_words_the_cause_is_how_it_ended() -> None:
    bench = Bench()
    bench.begin()

    bench.end(ENGINE, -9)
    bench.tick()

    assert bench.child(ENGINE).cause == "was ended by SIGKILL"


# --- silence -----------------------------------------------------------------------------------


def test_a_child_that_says_nothing_for_a_minute_is_killed_and_restarted() -> None:
    bench = Bench()
    bench.begin()
    for _ in range(60):
        bench.says(FRONT)
        bench.tick(1.0)
    assert bench.processes[ENGINE].signals == []

    bench.says(FRONT)
    bench.tick(0.5)

    assert bench.processes[ENGINE].signals == ["KILL"]
    assert bench.processes[FRONT].signals == []
    assert bench.fail_until_start(ENGINE, code=-9) == 1


def test_a_child_that_never_spoke_is_killed_too() -> None:
    bench = Bench()
    bench.tick()

    bench.tick(61.0)

    assert bench.processes[ENGINE].signals == ["KILL"]


def test_a_silent_child_is_killed_once() -> None:
    bench = Bench()
    bench.tick()
    bench.tick(61.0)

    for _ in range(10):
        bench.tick(1.0)

    assert bench.processes[ENGINE].signals == ["KILL"]


def test_a_child_that_speaks_is_left_alone_whatever_it_says() -> None:
    bench = Bench()
    bench.tick()

    for _ in range(20):
        bench.says(ENGINE, "loading")
        bench.says(FRONT, "starting")
        bench.tick(50.0)

    assert bench.processes[ENGINE].signals == []


# --- the stand-in on a front's port ------------------------------------------------------------


def test_after_five_failures_the_port_explains_itself() -> None:
    bench = Bench()
    bench.tick()
    for _ in range(4):
        bench.fail_until_start(FRONT)
        assert bench.stand_in.open_ports == {}

    bench.end(FRONT, 1)
    bench.tick()

    assert list(bench.stand_in.open_ports) == [7861]


def test_a_front_that_is_given_up_is_explained_at_once() -> None:
    bench = Bench()
    bench.begin()
    bench.words[FRONT] = "worker.errors.ConfigError: no key is set"

    bench.end(FRONT, 3)
    bench.tick()

    report = bench.stand_in.open_ports[7861]()
    assert report.cause == "exited with code 3: worker.errors.ConfigError: no key is set"
    assert (report.name, report.failures, report.next_try_s) == (FRONT, 1, None)


def test_the_stand_in_tells_the_time_that_is_left_when_it_is_asked() -> None:
    bench = Bench()
    bench.tick()
    for _ in range(4):
        bench.fail_until_start(FRONT)
    bench.end(FRONT, 1)
    bench.tick()
    report = bench.stand_in.open_ports[7861]

    first, later = report().next_try_s, None
    bench.now += 5.0
    later = report().next_try_s

    assert (first, later) == (16.0, 11.0)


def test_the_port_is_free_before_the_front_is_started_again() -> None:
    bench = Bench()
    bench.tick()

    for _ in range(7):
        bench.fail_until_start(FRONT)

    assert bench.ports_open_at_start == [set()] * len(bench.started)
    assert bench.stand_in.open_ports == {}


def test_an_engine_has_no_port_to_explain_on() -> None:
    bench = Bench()
    bench.tick()

    for _ in range(6):
        bench.fail_until_start(ENGINE)
    bench.end(ENGINE, 3)
    bench.tick()

    assert bench.stand_in.open_ports == {}


# --- what fronts are told about engines --------------------------------------------------------


def last_notice(bench: Bench) -> EngineNotice:
    notice = bench.told(FRONT, EngineNotice)[-1]
    assert isinstance(notice, EngineNotice)
    return notice


def test_while_an_engine_is_down_its_front_knows_why_and_until_when() -> None:
    bench = Bench()
    bench.begin()
    for _ in range(3):
        bench.fail_until_start(ENGINE)
    bench.words[ENGINE] = "torch.OutOfMemoryError: no room"
    bench.end(ENGINE, 1)
    bench.tick()

    bench.tick(3.0)

    assert last_notice(bench) == EngineNotice(
        name=ENGINE, cause="exited with code 1: torch.OutOfMemoryError: no room", next_try_s=5.0
    )


def test_a_front_is_told_again_every_second_and_not_more_often() -> None:
    bench = Bench()
    bench.begin()
    bench.fail_until_start(ENGINE)
    bench.wire.sent.clear()

    for _ in range(100):
        bench.tick(0.1)

    assert 9 <= len(bench.told(FRONT, EngineNotice)) <= 11


def test_the_front_of_an_engine_that_is_given_up_is_told_so() -> None:
    bench = Bench()
    bench.begin()
    bench.end(ENGINE, 3)

    bench.tick()
    bench.tick(1.0)

    assert last_notice(bench) == EngineNotice(
        name=ENGINE, cause="exited with code 3", next_try_s=None
    )


def test_the_front_of_a_running_engine_is_told_that_nothing_is_wrong() -> None:
    bench = Bench()
    bench.begin()
    bench.fail_until_start(ENGINE)

    bench.tick(1.0)

    assert last_notice(bench) == EngineNotice(name=ENGINE, cause=None, next_try_s=None)


def test_a_front_that_does_not_run_is_told_nothing() -> None:
    bench = Bench()
    bench.begin()
    bench.end(FRONT, 3)
    bench.tick()
    bench.wire.sent.clear()

    for _ in range(5):
        bench.tick(1.0)

    assert bench.wire.sent == []


def test_engines_are_told_nothing() -> None:
    bench = Bench()
    bench.begin()
    bench.fail_until_start(ENGINE)
    bench.supervisor.stop()
    bench.tick(1.0)

    assert {name for name, _ in bench.wire.sent} == {FRONT}


# --- status ------------------------------------------------------------------------------------


def test_a_model_with_a_problem_makes_all_degraded() -> None:
    bench = Bench()
    bench.begin()
    broken = ModelState(
        id="m", kind="chat", status="broken", display_name="M", problem="m: files are missing"
    )

    bench.says(ENGINE, models=(broken,))
    bench.tick()

    assert bench.supervisor.status() == "degraded"


def test_a_failed_child_makes_all_degraded_until_it_is_ready_again() -> None:
    bench = Bench()
    bench.begin()
    bench.fail_until_start(ENGINE)
    assert bench.supervisor.status() == "degraded"

    bench.says(ENGINE)
    bench.tick()

    assert bench.supervisor.status() == "ready"


# --- stopping ----------------------------------------------------------------------------------


def test_a_stop_tells_fronts_to_drain_and_ends_nothing_yet() -> None:
    bench = Bench()
    bench.begin()

    bench.supervisor.stop()
    bench.tick()

    assert bench.told(FRONT, Drain) == [Drain(grace_s=GRACE_S)]
    assert bench.supervisor.status() == "draining"
    assert all(process.signals == [] for process in bench.processes.values())
    assert not bench.supervisor.done


def test_a_drain_is_told_until_the_front_confirms_it() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    for _ in range(3):
        bench.tick(1.0)

    bench.says(FRONT, "draining", active=1)
    for _ in range(3):
        bench.tick(1.0)

    grace = [drain.grace_s for drain in bench.told(FRONT, Drain)]
    assert grace == [GRACE_S, GRACE_S - 1, GRACE_S - 2]


def test_a_front_that_has_not_confirmed_the_drain_may_still_take_a_request() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "ready", active=0)

    bench.tick(0.1)

    assert bench.processes[FRONT].signals == []


def test_running_work_is_waited_for() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    for _ in range(5):
        bench.says(FRONT, "draining", active=1)
        bench.tick(10.0)
        assert bench.processes[FRONT].signals == []

    bench.says(FRONT, "draining", active=0)
    bench.tick(0.1)

    assert bench.processes[FRONT].signals == ["TERM"]
    assert bench.processes[ENGINE].signals == []


def test_engines_end_after_the_fronts() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=0)
    bench.tick(0.1)
    assert bench.processes[ENGINE].signals == []

    bench.end(FRONT, 0)
    bench.settle()
    assert bench.processes[ENGINE].signals == ["TERM"]
    assert not bench.supervisor.done
    bench.end(ENGINE, 0)
    bench.settle()

    assert bench.supervisor.done
    assert bench.supervisor.drained


def test_after_the_grace_nothing_is_waited_for() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=1)
    bench.tick(GRACE_S - 0.1)
    assert bench.processes[FRONT].signals == []

    bench.tick(0.2)

    assert bench.processes[FRONT].signals == ["TERM"]


def end_everything(bench: Bench) -> None:
    for name in (FRONT, ENGINE):
        bench.end(name, 0)
        bench.settle()


def test_work_that_the_grace_cut_short_was_not_drained() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=1)
    bench.tick(GRACE_S + 0.1)

    end_everything(bench)

    assert bench.supervisor.done
    assert not bench.supervisor.drained


def test_a_second_stop_waits_for_nothing_and_did_not_drain() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=1)
    bench.tick(0.1)
    assert bench.processes[FRONT].signals == []

    bench.supervisor.stop()
    bench.tick(0.1)

    assert bench.processes[FRONT].signals == ["TERM"]
    end_everything(bench)
    assert bench.supervisor.done
    assert not bench.supervisor.drained


def test_a_second_stop_while_nothing_runs_is_still_a_drain() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=0)

    bench.supervisor.stop()
    bench.tick(0.1)
    end_everything(bench)

    assert bench.supervisor.drained


def test_a_child_that_does_not_end_is_killed_after_its_time() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=0)
    bench.tick(0.1)

    bench.tick(KILL_AFTER_S)
    assert bench.processes[FRONT].signals == ["TERM"]
    bench.tick(0.1)

    assert bench.processes[FRONT].signals == ["TERM", "KILL"]


def test_a_child_that_ends_while_stopping_is_not_restarted() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=1)
    bench.end(ENGINE, -9)

    for _ in range(5):
        bench.tick(5.0)

    assert len(bench.starts_of(ENGINE)) == 1
    assert bench.child(ENGINE).status() == "stopped"


def test_a_silent_child_is_not_killed_while_it_drains() -> None:
    bench = Bench()
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    bench.says(FRONT, "draining", active=1)
    bench.tick(0.1)

    bench.tick(59.5)

    assert bench.processes[ENGINE].signals == []


def test_a_front_that_never_spoke_holds_up_no_stop() -> None:
    bench = Bench()
    bench.tick()

    bench.supervisor.stop()
    bench.tick(0.1)

    assert bench.processes[FRONT].signals == ["TERM"]


def test_a_stop_before_the_first_tick_starts_nothing() -> None:
    bench = Bench()

    bench.supervisor.stop()
    bench.tick()

    assert bench.started == []
    assert bench.supervisor.done


def test_a_stop_while_no_child_runs_cuts_nothing_short() -> None:
    bench = Bench()
    bench.begin()
    for name in (ENGINE, FRONT):
        bench.end(name, 3)
    bench.tick()

    bench.supervisor.stop()
    while not bench.supervisor.done:
        bench.tick(0.1)

    assert bench.supervisor.drained


def test_a_stop_closes_the_stand_in() -> None:
    bench = Bench()
    bench.begin()
    bench.end(FRONT, 3)
    bench.tick()
    assert list(bench.stand_in.open_ports) == [7861]

    bench.supervisor.stop()
    bench.tick()

    assert bench.stand_in.open_ports == {}


def test_a_child_that_waits_for_its_next_start_is_stopped_by_a_stop() -> None:
    bench = Bench()
    bench.begin()
    for _ in range(3):
        bench.fail_until_start(ENGINE)
    bench.end(ENGINE, 1)
    bench.tick()
    assert bench.child(ENGINE).status() == "waiting"

    bench.supervisor.stop()
    bench.says(FRONT, "draining", active=0)
    bench.tick(0.1)
    bench.tick(20.0)

    assert len(bench.starts_of(ENGINE)) == 4
    assert bench.child(ENGINE).next_try_s(bench.now) is None
    assert bench.child(ENGINE).status() == "stopped"


def test_with_two_fronts_engines_wait_for_the_last() -> None:
    bench = Bench((*SPECS, ChildSpec("front media", ("front",), port=7860)))
    bench.begin()
    bench.supervisor.stop()
    bench.tick()
    for name in (FRONT, "front media"):
        bench.says(name, "draining", active=0)
    bench.tick(0.1)

    bench.end(FRONT, 0)
    bench.settle()
    assert bench.processes[ENGINE].signals == []
    bench.end("front media", 0)
    bench.settle()

    assert bench.processes[ENGINE].signals == ["TERM"]


def test_one_busy_front_keeps_every_front_up() -> None:
    # The fronts share engines, and a front that ended could not say that the daemon drains.
    bench = Bench((*SPECS, ChildSpec("front media", ("front",), port=7860)))
    bench.begin()
    bench.supervisor.stop()
    bench.tick()

    bench.says(FRONT, "draining", active=0)
    bench.says("front media", "draining", active=2)
    bench.tick(0.1)

    assert bench.processes[FRONT].signals == []
    assert bench.processes["front media"].signals == []
