"""Lists of jobs on a real Redis server: over its own protocol, and over a REST interface to it."""

from __future__ import annotations

import base64
import json
import os
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing, contextmanager, suppress
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit, urlunsplit

import httpx
import pytest
import redis

from tests.redis_server import RedisServer, free_port, running_redis
from tests.upstash_bridge import bridge
from worker.config import REPOSITORY
from worker.errors import ConfigError, has_trap_word
from worker.queues.elements import decode_element
from worker.queues.lists import ListQueue
from worker.queues.queue import ALIVE_S, JobQueue, QueueUnavailable
from worker.queues.redis_queue import RedisQueue
from worker.queues.upstash_queue import UpstashQueue

TOKEN = "a-token-that-no-message-may-hold"
WAYS = ("redis", "upstash")
AT = "2026-01-02T03:04:05Z"

ELEMENTS = [
    b'{"id":"1","prompt":"a \\"red\\" cat"}',
    json.dumps(['{"id":"2"}']).encode(),
    '{"id":"3","prompt":"Ünï \U0001f408 \\ud83d/%2F\\u0000"}'.encode(),
    b' {"id": "4"} \r\n',
    b"",
    b"OK",
    b"null",
    b"T0s=",  # looks like base64
    b"\xff\xfe\x00\r\n/not UTF-8",
]

MakeQueue = Callable[..., ListQueue]


@pytest.fixture(scope="module")
def server() -> Iterator[RedisServer]:
    with running_redis() as running:
        yield running


@pytest.fixture(scope="module")
def rest_url(server: RedisServer) -> Iterator[str]:
    with bridge(server.url, TOKEN) as url:
        yield url


@pytest.fixture(params=WAYS)
def way(request: pytest.FixtureRequest) -> str:
    chosen: str = request.param
    return chosen


@pytest.fixture
def name() -> str:
    """A list of this test's own."""
    return f"list-{uuid.uuid4().hex}"


@pytest.fixture
def look(server: RedisServer) -> Iterator[redis.Redis]:
    """Looks at the server without a queue."""
    with closing(server.client()) as client:
        yield client


@pytest.fixture
def make(way: str, server: RedisServer, rest_url: str, name: str) -> Iterator[MakeQueue]:
    """Builds queues on the test's list: `make("worker-2", timeout_s=0.2, through=wire)`."""
    with ExitStack() as stack:

        def build(worker: str = "worker-1", *, through: Wire | None = None, **more: Any) -> Any:
            url = server.url if way == "redis" else rest_url
            if through is not None:
                url = at_port(url, through.port)
            return stack.enter_context(closing(build_queue(way, url, name, worker, **more)))

        yield build


def build_queue(way: str, url: str, name: str, worker: str = "worker-1", **more: Any) -> ListQueue:
    if way == "redis":
        return RedisQueue(url, name, worker, **more)
    return UpstashQueue(url, TOKEN, name, worker, **more)


@contextmanager
def queue_at(way: str, redis_url: str, name: str, **more: Any) -> Iterator[ListQueue]:
    """A queue on a server of the test's own, with a bridge where the way needs one."""
    with ExitStack() as stack:
        url = redis_url if way == "redis" else stack.enter_context(bridge(redis_url, TOKEN))
        yield stack.enter_context(closing(build_queue(way, url, name, **more)))


def at_port(url: str, port: int) -> str:
    parts = urlsplit(url)
    return urlunsplit(parts._replace(netloc=f"127.0.0.1:{port}"))


def push(look: redis.Redis, name: str, *elements: bytes) -> None:
    look.rpush(name, *elements)


def stored(look: redis.Redis, key: str) -> list[bytes]:
    elements: list[bytes] = look.lrange(key, 0, -1)  # type: ignore[assignment]
    return elements


def take_all(queue: JobQueue) -> list[bytes]:
    return list(iter(queue.take, None))


def seem_dead(look: redis.Redis, name: str, worker: str) -> None:
    """As ALIVE_S after its last sign of life."""
    look.delete(f"{name}:alive:{worker}")


# --- elements ----------------------------------------------------------------------------------


def test_an_empty_list_has_nothing_to_take(make: MakeQueue) -> None:
    assert make().take() is None


def test_elements_come_first_in_first_out_and_byte_for_byte(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, *ELEMENTS)

    taken = take_all(make())

    assert taken == ELEMENTS


def test_what_is_taken_lies_in_the_workers_own_list_until_it_is_settled(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, *ELEMENTS)
    queue = make()
    take_all(queue)

    left = []
    for element in ELEMENTS:
        left.append(stored(look, f"{name}:processing:worker-1"))
        queue.settle(element)

    assert left == [ELEMENTS[n:] for n in range(len(ELEMENTS))]
    assert not look.exists(name, f"{name}:processing:worker-1")


def test_settling_removes_one_of_two_equal_elements(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"twin", b"twin")
    queue = make()
    take_all(queue)

    queue.settle(b"twin")

    assert stored(look, f"{name}:processing:worker-1") == [b"twin"]
    assert queue.take() is None


def test_settling_what_is_not_held_does_nothing(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a", b"b")
    queue = make()
    queue.take()

    queue.settle(b"b")
    queue.settle(b"\xff")
    queue.settle(b"a")
    queue.settle(b"a")

    assert queue.take() == b"b"


def test_waiting_counts_what_nobody_has_taken(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    queue = make()
    before = queue.waiting()
    push(look, name, b"a", b"b", b"c")
    queue.take()

    assert (before, queue.waiting()) == (0, 2)


def test_held_is_what_an_earlier_life_left_and_take_does_not_repeat_it(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, *ELEMENTS)
    earlier = make()
    left = [earlier.take() for _ in range(len(ELEMENTS) - 1)]

    later = make()
    held = later.held()

    assert held == left
    assert take_all(later) == ELEMENTS[-1:]


def test_who_does_not_ask_what_is_held_gets_it_first_from_take(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a", b"b", b"c", b"d")
    earlier = make()
    earlier.take()
    earlier.take()

    taken = take_all(make())

    assert taken == [b"a", b"b", b"c", b"d"]


def test_elements_given_back_newest_first_stand_in_front_in_their_order(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, *ELEMENTS, b"last")
    queue = make()
    taken = [queue.take() for _ in ELEMENTS]

    for element in reversed(taken):
        assert element is not None
        queue.give_back(element)

    assert stored(look, name) == [*ELEMENTS, b"last"]
    assert queue.held() == []


def test_an_element_that_is_not_held_cannot_be_given_back_or_buried(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    queue = make()
    queue.take()
    queue.give_back(b"a")

    queue.give_back(b"a")
    queue.bury(b"a", "no job", "worker-1", AT)

    assert stored(look, name) == [b"a"]
    assert not look.exists(f"{name}:dead")


def test_an_element_given_back_can_be_taken_again(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    queue = make()
    queue.take()
    queue.give_back(b"a")

    assert queue.take() == b"a"
    assert queue.take() is None


def test_a_buried_element_is_a_dead_letter_with_its_reason(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, *ELEMENTS)
    queue = make()
    take_all(queue)

    for element in ELEMENTS:
        queue.bury(element, "it is no job", "worker-1", AT)

    letters = [json.loads(letter) for letter in stored(look, f"{name}:dead")]
    start = {"reason": "it is no job", "worker": "worker-1", "at": AT}
    assert letters == [
        *(start | {"element": element.decode()} for element in ELEMENTS[:-1]),
        start | {"element_base64": base64.b64encode(ELEMENTS[-1]).decode()},
    ]
    assert queue.held() == []


def test_a_large_element_that_is_not_utf8_can_be_buried(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    element = b"\xff" * (2 << 20)
    push(look, name, element)
    queue = make()
    queue.take()

    queue.bury(element, "it is no job", "worker-1", AT)

    (letter,) = stored(look, f"{name}:dead")
    assert base64.b64decode(json.loads(letter)["element_base64"]) == element
    assert queue.held() == []


@pytest.mark.parametrize("element", [b"a", b"\xff"])
def test_an_element_stays_where_it_is_when_it_cannot_be_moved(
    make: MakeQueue, look: redis.Redis, name: str, element: bytes
) -> None:
    push(look, name, element)
    queue = make()
    queue.take()
    look.set(name, "no list")
    look.set(f"{name}:dead", "no list")

    with pytest.raises(QueueUnavailable, match="WRONGTYPE"):
        queue.give_back(element)
    with pytest.raises(QueueUnavailable, match="WRONGTYPE"):
        queue.bury(element, "it is no job", "worker-1", AT)

    assert queue.held() == [element]


def test_several_workers_never_get_the_same_element(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    elements = [b"element %d" % number for number in range(120)]
    push(look, name, *elements)
    taken: list[list[bytes]] = [[] for _ in range(4)]
    gate = threading.Barrier(4)

    def work(number: int) -> None:
        queue = make(f"worker-{number}")
        gate.wait()
        taken[number] += take_all(queue)

    in_threads(work, 4)

    assert sorted(element for part in taken for element in part) == sorted(elements)
    assert all(part == sorted(part, key=elements.index) for part in taken)


def test_one_queue_can_be_used_by_several_threads(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    elements = [b"element %d" % number for number in range(60)]
    push(look, name, *elements)
    queue = make()
    taken: list[bytes] = []

    def work(_: int) -> None:
        while (element := queue.take()) is not None:
            queue.beat()
            queue.settle(element)
            taken.append(element)

    in_threads(work, 3)

    assert sorted(taken) == sorted(elements)
    assert queue.held() == []


def in_threads(work: Callable[[int], None], count: int) -> None:
    threads = [threading.Thread(target=work, args=(number,)) for number in range(count)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert not any(thread.is_alive() for thread in threads)


# --- the producer ------------------------------------------------------------------------------


def test_a_push_of_todays_producer_comes_out_as_its_job(
    make: MakeQueue, rest_url: str, name: str
) -> None:
    job = {"id": "7f9c", "type": "sdxl_image_high", "prompt": 'a "cat" Ü', "config": {"seed": 0}}
    pushed = httpx.post(
        f"{rest_url}/rpush/{name}",
        headers={"Authorization": f"Bearer {TOKEN}"},
        content=json.dumps([json.dumps(job)]),
        trust_env=False,
    )

    element = make().take()

    assert pushed.json() == {"result": 1}
    assert element == json.dumps([json.dumps(job)]).encode()
    assert decode_element(element) == [job]


# --- workers -----------------------------------------------------------------------------------


def test_a_worker_that_takes_can_be_found_and_lives(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")

    make("pod-1").take()

    assert look.smembers(f"{name}:workers") == {b"pod-1"}
    assert 0 < look.ttl(f"{name}:alive:pod-1") <= ALIVE_S


def test_a_beat_is_a_sign_of_life(make: MakeQueue, look: redis.Redis, name: str) -> None:
    queue = make("pod-1")
    push(look, name, b"a")
    queue.take()
    look.expire(f"{name}:alive:pod-1", 5)
    look.delete(f"{name}:workers")

    queue.beat()

    assert 5 < look.ttl(f"{name}:alive:pod-1") <= ALIVE_S
    assert look.smembers(f"{name}:workers") == {b"pod-1"}


def test_orphans_are_others_that_left_elements_and_give_no_sign_of_life(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a", b"b", b"c", b"d")
    for worker in ("alive", "gone-2", "gone-1", "mine"):
        make(worker).take()
    make("idle").take()
    for worker in ("gone-1", "gone-2", "mine", "idle"):
        seem_dead(look, name, worker)

    assert make("mine").orphans() == ["gone-1", "gone-2"]


def test_a_worker_that_ended_in_good_order_is_forgotten(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    make("done").take()
    make("done").settle(b"a")
    make("alive").beat()
    seem_dead(look, name, "done")

    orphans = make("alive").orphans()

    assert orphans == []
    assert look.smembers(f"{name}:workers") == {b"alive"}


def test_names_that_no_worker_can_have_are_no_orphans(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    for member in (b"a b", b"\xff", b"x" * 65):
        look.sadd(f"{name}:workers", member)
        look.rpush(f"{name}:processing:".encode() + member, b"a")

    assert make().orphans() == []


def test_an_orphans_elements_stand_in_front_in_their_order(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, *ELEMENTS)
    gone = make("gone")
    for _ in ELEMENTS[:-1]:
        gone.take()
    seem_dead(look, name, "gone")

    queue = make()
    moved = queue.adopt("gone")

    assert moved == len(ELEMENTS) - 1
    assert take_all(queue) == ELEMENTS
    assert queue.orphans() == []


def test_a_worker_that_lives_again_keeps_its_elements(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    slow = make("slow")
    slow.take()
    seem_dead(look, name, "slow")
    queue = make()
    orphans = queue.orphans()
    slow.beat()

    moved = queue.adopt("slow")

    assert (orphans, moved) == (["slow"], 0)
    assert slow.held() == [b"a"]


def test_a_worker_that_starts_again_keeps_what_it_finds(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    make("pod-1").take()
    seem_dead(look, name, "pod-1")

    held = make("pod-1").held()

    assert held == [b"a"]
    assert make("pod-2").adopt("pod-1") == 0


def test_two_workers_that_adopt_at_once_move_everything_once(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    elements = [b"element %d" % number for number in range(30)]
    push(look, name, *elements)
    take_all(make("gone"))
    seem_dead(look, name, "gone")
    moved = [0, 0]
    gate = threading.Barrier(2)

    def work(number: int) -> None:
        queue = make(f"worker-{number}")
        gate.wait()
        moved[number] = queue.adopt("gone")

    in_threads(work, 2)

    assert sum(moved) == len(elements)
    assert stored(look, name) == elements


def test_what_was_adopted_from_a_worker_is_no_longer_its_own_to_move(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    slow = make("slow")
    slow.take()
    seem_dead(look, name, "slow")
    queue = make()
    queue.adopt("slow")
    queue.take()

    slow.give_back(b"a")
    slow.bury(b"a", "it is no job", "slow", AT)
    slow.settle(b"a")

    assert queue.held() == [b"a"]
    assert not look.exists(name, f"{name}:dead")


def test_a_worker_finds_that_it_was_adopted_until_it_has_noted_it(
    make: MakeQueue, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    slow, other = make("slow"), make()
    slow.take()
    seem_dead(look, name, "slow")
    before = slow.was_adopted()
    other.adopt("slow")

    found = slow.was_adopted(), other.was_adopted()
    slow.note_adoption()

    assert (before, found, slow.was_adopted()) == (False, (True, False), False)


def test_a_worker_does_not_adopt_itself(make: MakeQueue) -> None:
    with pytest.raises(ValueError, match="its own"):
        make("worker-1").adopt("worker-1")


CHILD = """
import os, sys
from worker.queues.configured import queues_from_environment
queue, = queues_from_environment(os.environ, [sys.argv[1]], "pod-1")
queue.beat()
print(queue.take(), flush=True)
sys.stdin.read()
"""


def test_a_worker_killed_between_take_and_settle_loses_nothing(
    way: str, make: MakeQueue, server: RedisServer, rest_url: str, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a", b"b")
    where = {"REDIS_URL": server.url}
    if way == "upstash":
        where = {"UPSTASH_REDIS_REST_URL": rest_url, "UPSTASH_REDIS_REST_TOKEN": TOKEN}
    with subprocess.Popen(
        [sys.executable, "-c", CHILD, name],
        cwd=REPOSITORY,
        env={**os.environ, **where},
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as child:
        assert child.stdout is not None
        printed = child.stdout.readline()
        child.kill()

    queue = make("pod-1")
    held = queue.held()

    assert printed == "b'a'\n"
    assert held == [b"a"]
    assert queue.take() == b"b"


# --- a network with faults ---------------------------------------------------------------------


class Wire:
    """A connection to a local port; it breaks in place of an answer that is to be lost."""

    def __init__(self, port: int):
        self._target = port
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self._listener.getsockname()[1]
        self.loses_next_answer = False
        self._sockets: list[socket.socket] = []
        self._threads = [threading.Thread(target=self._accept, daemon=True)]
        self._threads[0].start()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                near, _ = self._listener.accept()
                far = socket.create_connection(("127.0.0.1", self._target))
                self._sockets += [near, far]
                for pump in (self._ask, self._answer):
                    thread = threading.Thread(target=pump, args=(near, far), daemon=True)
                    self._threads.append(thread)
                    thread.start()

    def _ask(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := near.recv(1 << 16):
                far.sendall(data)
            far.shutdown(socket.SHUT_RDWR)

    def _answer(self, near: socket.socket, far: socket.socket) -> None:
        with suppress(OSError):
            while data := far.recv(1 << 16):
                if self.loses_next_answer:
                    self.loses_next_answer = False
                    break
                near.sendall(data)
            near.shutdown(socket.SHUT_RDWR)
            far.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._listener.shutdown(socket.SHUT_RDWR)
        for one in self._sockets:
            with suppress(OSError):
                one.shutdown(socket.SHUT_RDWR)
        for thread in self._threads:
            thread.join(10)
        for one in (self._listener, *self._sockets):
            one.close()


@pytest.fixture
def wire(way: str, server: RedisServer, rest_url: str) -> Iterator[Wire]:
    """What the queues of the test that are made with `through=wire` go through."""
    port = urlsplit(server.url if way == "redis" else rest_url).port
    assert port is not None
    with closing(Wire(port)) as made:
        yield made


def without_answer(wire: Wire, queue: ListQueue, act: Callable[[], Any]) -> None:
    """Have `act` done on the server, and its answer lost."""
    queue.waiting()  # so that the connection is there
    wire.loses_next_answer = True
    with pytest.raises(QueueUnavailable):
        act()
    assert not wire.loses_next_answer


def test_an_element_whose_answer_was_lost_is_taken_next(
    make: MakeQueue, wire: Wire, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a", b"b", b"c", b"d")
    queue = make(through=wire)
    first = queue.take()
    without_answer(wire, queue, queue.take)
    without_answer(wire, queue, queue.take)
    moved = stored(look, f"{name}:processing:worker-1")

    taken = take_all(queue)

    assert (first, moved) == (b"a", [b"a", b"b"])  # the second loss hit the repetition
    assert taken == [b"b", b"c", b"d"]


def test_a_lost_answer_about_twins_is_noticed(
    make: MakeQueue, wire: Wire, look: redis.Redis, name: str
) -> None:
    push(look, name, b"twin", b"twin", b"twin")
    queue = make(through=wire)
    queue.take()
    without_answer(wire, queue, queue.take)

    taken = take_all(queue)

    assert taken == [b"twin", b"twin"]


@pytest.mark.parametrize("end", ["settle", "give_back", "bury"])
def test_a_lost_answer_is_noticed_after_other_elements_have_left(
    make: MakeQueue, wire: Wire, look: redis.Redis, name: str, end: str
) -> None:
    push(look, name, b"a")
    queue = make(through=wire)
    queue.take()
    if end == "settle":
        queue.settle(b"a")
    elif end == "give_back":
        queue.give_back(b"a")
        look.delete(name)
    else:
        queue.bury(b"a", "it is no job", "worker-1", AT)
    push(look, name, b"b", b"c")
    without_answer(wire, queue, queue.take)

    taken = take_all(queue)

    assert taken == [b"b", b"c"]


def test_a_command_is_sent_once(make: MakeQueue, wire: Wire, look: redis.Redis, name: str) -> None:
    queue = make(through=wire)
    queue.take()
    before = times_done(look, "eval")

    without_answer(wire, queue, queue.beat)

    assert times_done(look, "eval") == before + 1


def times_done(look: redis.Redis, command: str) -> int:
    calls: int = look.info("commandstats")[f"cmdstat_{command}"]["calls"]
    return calls


@pytest.mark.parametrize("element", [b"a", b"\xff"])
def test_every_move_can_be_repeated_when_its_answer_was_lost(
    make: MakeQueue, wire: Wire, look: redis.Redis, name: str, element: bytes
) -> None:
    push(look, name, element)
    queue = make(through=wire)
    queue.take()

    without_answer(wire, queue, lambda: queue.give_back(element))
    queue.give_back(element)
    given = stored(look, name)
    queue.take()
    without_answer(wire, queue, lambda: queue.settle(element))
    queue.settle(element)

    assert given == [element]
    assert not look.exists(name, f"{name}:processing:worker-1")


def test_an_element_is_buried_once_when_the_answer_was_lost(
    make: MakeQueue, wire: Wire, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    queue = make(through=wire)
    queue.take()

    without_answer(wire, queue, lambda: queue.bury(b"a", "it is no job", "worker-1", AT))
    queue.bury(b"a", "it is no job", "worker-1", AT)

    assert len(stored(look, f"{name}:dead")) == 1


def test_a_command_that_a_stopped_server_does_late_loses_no_element(way: str, name: str) -> None:
    with (
        running_redis() as own,
        closing(own.client()) as look,
        queue_at(way, own.url, name, timeout_s=1.0) as queue,
    ):
        push(look, name, b"a", b"b", b"c")
        first = queue.take()
        own.pause()
        with pytest.raises(QueueUnavailable, match="did not answer within 1 s"):
            queue.take()
        own.resume()
        wait_for(lambda: len(stored(look, f"{name}:processing:worker-1")) == 2)

        rest = take_all(queue)

    assert [first, *rest] == [b"a", b"b", b"c"]


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 10
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_a_queue_works_again_when_its_server_does(way: str, name: str) -> None:
    with running_redis() as own, queue_at(way, own.url, name) as queue:
        queue.beat()
        own.kill()
        with pytest.raises(QueueUnavailable) as caught:
            queue.take()
        own.start()
        with closing(own.client()) as look:
            push(look, name, b"a")

        assert queue.take() == b"a"
    assert caught.value.retry_after_s is not None


def test_a_restart_between_two_commands_is_not_noticed(way: str, name: str) -> None:
    with running_redis() as own, queue_at(way, own.url, name) as queue:
        queue.beat()
        own.stop()
        own.start()

        assert queue.waiting() == 0


@pytest.mark.parametrize("way", WAYS)
def test_a_server_that_accepts_and_never_answers_is_given_up_in_time(way: str, name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as silent:
        url = silent_url(way, silent.getsockname()[1])
        started = time.monotonic()

        with (
            closing(build_queue(way, url, name, timeout_s=0.2)) as queue,
            pytest.raises(QueueUnavailable) as caught,
        ):
            queue.take()

        took_s = time.monotonic() - started
    assert 0.2 <= took_s < 2
    assert "did not answer within 0.2 s" in str(caught.value)
    assert not has_trap_word(str(caught.value))


@pytest.mark.parametrize("way", WAYS)
def test_a_port_where_nobody_listens_is_unavailable(way: str, name: str) -> None:
    url = silent_url(way, free_port())

    with (
        closing(build_queue(way, url, name)) as queue,
        pytest.raises(QueueUnavailable) as caught,
    ):
        queue.take()

    assert "cannot be reached: Connect" in str(caught.value)
    assert (caught.value.status, caught.value.code) == (503, "queue_unavailable")
    assert not has_trap_word(str(caught.value))


def silent_url(way: str, port: int) -> str:
    return f"{'redis' if way == 'redis' else 'http'}://127.0.0.1:{port}"


# --- a Redis server that refuses ---------------------------------------------------------------


def refusal(queue: ListQueue) -> str:
    """What `take` says about its server; holds no secret, and no word that a client misreads."""
    with closing(queue), pytest.raises(QueueUnavailable) as caught:
        queue.take()
    message = str(caught.value)
    assert "secret" not in message and TOKEN not in message
    assert not has_trap_word(message)
    return message


@pytest.mark.parametrize(
    ("user", "said"),
    [
        (":wrong-secret@", "does not accept the password or token (WRONGPASS)"),
        ("nobody:wrong-secret@", "does not accept the password or token (WRONGPASS)"),
        ("", "wants a password and was given none (NOAUTH)"),
    ],
)
def test_a_wrong_password_is_said_and_not_repeated(user: str, said: str, name: str) -> None:
    with running_redis(password="right-secret") as own:
        message = refusal(RedisQueue(f"redis://{user}127.0.0.1:{own.port}/0", name, "w"))

    assert said in message


def test_the_right_password_opens(name: str) -> None:
    with running_redis(password="right-secret") as own:
        with closing(RedisQueue(own.url, name, "w")) as queue:
            assert queue.take() is None


def test_a_password_for_a_server_without_one_is_said(server: RedisServer, name: str) -> None:
    queue = RedisQueue(f"redis://:some-secret@127.0.0.1:{server.port}", name, "w")

    assert "does not accept the password" in refusal(queue)


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("--user", *"default on nopass ~* +@all -eval".split()), "(NOPERM)"),
        (("--user", *"default on nopass ~other* +@all".split()), "(NOPERM)"),
        (("--maxmemory", "1"), "has no memory left for writing (OOM)"),
        (("--rename-command", "EVAL", ""), "queues need Redis 6.2 or later"),
        (("--replicaof", "127.0.0.1 1"), "is a replica that takes no writes (READONLY)"),
    ],
)
def test_what_a_server_refuses_is_said(arguments: tuple[str, ...], said: str, name: str) -> None:
    with running_redis(arguments=arguments) as own:
        message = refusal(RedisQueue(own.url, name, "w"))

    assert said in message


def test_a_server_that_is_no_redis_is_said(name: str) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def greet() -> None:
            client, _ = listener.accept()
            with client:
                client.sendall(b"220 mail.example ready\r\n")
                client.recv(1)

        thread = threading.Thread(target=greet)
        thread.start()
        url = f"redis://127.0.0.1:{listener.getsockname()[1]}"
        message = refusal(RedisQueue(url, name, "w"))
        thread.join()

    assert "does not speak the protocol of Redis" in message


def test_a_host_that_is_no_name_is_said(name: str) -> None:
    message = refusal(RedisQueue("redis://:secret@a..b", name, "w"))

    assert "is no host name" in message


def test_a_unix_socket_is_a_way_too(tmp_path: Path, name: str) -> None:
    path = tmp_path / "redis.sock"
    with running_redis(arguments=("--unixsocket", str(path))):
        with closing(RedisQueue(f"unix://{path}?db=3", name, "w")) as queue:
            assert queue.take() is None


def test_an_encrypted_connection_wants_a_certificate_that_it_can_check(
    tmp_path: Path, name: str
) -> None:
    port = free_port()
    certificate, key = certificate_for("127.0.0.1", tmp_path)
    files = ("--tls-cert-file", str(certificate), "--tls-key-file", str(key))
    with running_redis(arguments=("--tls-port", str(port), "--tls-auth-clients", "no", *files)):
        stranger = RedisQueue(f"rediss://127.0.0.1:{port}", name, "w")
        friend = RedisQueue(f"rediss://127.0.0.1:{port}?ssl_ca_certs={certificate}", name, "w")

        with closing(friend):
            assert friend.take() is None
        assert "cannot be reached: SSLCertVerificationError" in refusal(stranger)


def certificate_for(address: str, folder: Path) -> tuple[Path, Path]:
    """Files of a certificate that signs itself, and of its key."""
    import datetime
    import ipaddress

    x509 = pytest.importorskip("cryptography.x509", reason="cryptography is not installed")
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "redis")])
    now = datetime.datetime.now(datetime.UTC)
    names = x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address(address))])
    made = (
        x509.CertificateBuilder(subject, subject, key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .add_extension(names, critical=False)
        .add_extension(x509.BasicConstraints(ca=True, path_length=None), critical=True)
        .sign(key, hashes.SHA256())
    )
    paths = folder / "certificate.pem", folder / "key.pem"
    paths[0].write_bytes(made.public_bytes(serialization.Encoding.PEM))
    paths[1].write_bytes(
        key.private_bytes(
            serialization.Encoding.PEM,
            serialization.PrivateFormat.PKCS8,
            serialization.NoEncryption(),
        )
    )
    return paths


def test_options_of_an_address_cannot_change_what_a_queue_relies_on(
    server: RedisServer, look: redis.Redis, name: str
) -> None:
    push(look, name, b"a")
    options = "decode_responses=true&protocol=3&socket_timeout=600&retry_on_timeout=true"

    with closing(RedisQueue(f"{server.url}?{options}", name, "w")) as queue:
        assert queue.take() == b"a"


@pytest.mark.parametrize(
    "url",
    [
        "http://:secret@host",
        "secret",
        "",
        "redis://:secret@host:port",
        "redis://:secret@host:99999999",
        "redis://:secret@host?no_such_option=1",
        "redis://:secret@host?socket_timeout=soon",
        "redis://:secret@[::1",
    ],
)
def test_an_address_that_cannot_be_read_is_refused_and_not_repeated(url: str, name: str) -> None:
    with pytest.raises(ConfigError, match="REDIS_URL") as caught:
        RedisQueue(url, name, "w")

    assert "secret" not in str(caught.value)
    assert not has_trap_word(str(caught.value))


# --- an Upstash server that refuses ------------------------------------------------------------


def test_a_wrong_token_is_said_and_not_repeated(rest_url: str, name: str) -> None:
    message = refusal(UpstashQueue(rest_url, "wrong-secret", name, "w"))

    assert "does not accept the password or token (WRONGPASS)" in message


ANSWERS: list[tuple[int, str, str]] = [
    (401, '{"error": "Unauthorized"}', "does not accept the password or token"),
    (401, "go away", "does not accept the password or token"),
    (400, '{"error": "WRONGPASS wrong-secret"}', "does not accept the password or token"),
    (400, '{"error": "NOPERM this user has no permissions to run"}', "(NOPERM)"),
    (400, '{"error": "ERR max requests limit exceeded. Limit: 10, Usage: 10."}', "of its plan"),
    (400, '{"error": "ERR Command is not available: \'EVAL\' nan"}', "refused a command"),
    (200, '{"error": "ERR told with a wrong status"}', "refused a command"),
    (400, '{"error": "LOADING the dataset in memory"}', "is still reading its data (LOADING)"),
    (503, '{"error": "LOADING the dataset in memory"}', "status 503; it may pass"),
    (500, "<html>secret</html>", "status 500; it may pass"),
    (429, "", "status 429; it may pass"),
    (302, "", "status 302; check UPSTASH_REDIS_REST_URL"),
    (404, '{"message": "secret"}', "status 404"),
    (200, "<html>", "status 200"),
    (200, '{"results": []}', "status 200"),
    (200, "[]", "status 200"),
    (200, '{"result": "{\\"id\\": 1}"}', "did not answer in base64"),
    (200, '{"result": "Ü"}', "did not answer in base64"),
    (200, '{"result": true}', "did not answer in base64"),
    (200, '{"result": {"a": 1}}', "did not answer in base64"),
    (200, '{"result": 5}', "gave an answer that Redis does not give"),
    (200, '{"result": [5]}', "gave an answer that Redis does not give"),
]


@pytest.mark.parametrize(("status", "body", "said"), ANSWERS)
def test_an_answer_that_is_no_result_is_said(status: int, body: str, said: str, name: str) -> None:
    with answering(status, body) as url:
        message = refusal(UpstashQueue(url, "right-secret", name, "w"))

    assert said in message


@contextmanager
def answering(status: int, body: str) -> Iterator[str]:
    """A server that gives every request the same answer."""

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            self.rfile.read(int(self.headers["Content-Length"]))
            self.send_response(status)
            self.send_header("Location", "/elsewhere")
            self.send_header("Content-Length", str(len(body.encode())))
            self.end_headers()
            self.wfile.write(body.encode())

        def log_message(self, format: str, *args: Any) -> None:
            pass

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()


def test_a_proxy_of_the_environment_does_not_get_the_token(
    rest_url: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for variable in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.setenv(variable, f"http://127.0.0.1:{free_port()}")

    with closing(UpstashQueue(rest_url, TOKEN, name, "w")) as queue:
        assert queue.take() is None


@pytest.mark.parametrize(
    ("url", "token", "variable"),
    [
        ("", TOKEN, "UPSTASH_REDIS_REST_URL"),
        ("redis://host", TOKEN, "UPSTASH_REDIS_REST_URL"),
        ("host.example", TOKEN, "UPSTASH_REDIS_REST_URL"),
        ("https://", TOKEN, "UPSTASH_REDIS_REST_URL"),
        ("https://user:secret@host", TOKEN, "UPSTASH_REDIS_REST_URL"),
        ("https://host:port", TOKEN, "UPSTASH_REDIS_REST_URL"),
        ("https://host", "", "UPSTASH_REDIS_REST_TOKEN"),
        ("https://host", "two secret words", "UPSTASH_REDIS_REST_TOKEN"),
        ("https://host", "secret\n", "UPSTASH_REDIS_REST_TOKEN"),
        ("https://host", "secrét", "UPSTASH_REDIS_REST_TOKEN"),
    ],
)
def test_an_upstash_setting_that_cannot_be_used_is_refused_and_not_repeated(
    url: str, token: str, variable: str, name: str
) -> None:
    with pytest.raises(ConfigError, match=variable) as caught:
        UpstashQueue(url, token, name, "w")

    assert "secr" not in str(caught.value)
    assert not has_trap_word(str(caught.value))


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("worker", ["", "a b", "a:b", "ü", "x" * 65, "a\n"])
def test_a_worker_name_that_cannot_be_part_of_a_key_is_refused(way: str, worker: str) -> None:
    with pytest.raises(ConfigError, match="a worker needs a name"):
        build_queue(way, silent_url(way, 1), "list", worker)


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize("name", ["", "a b", "ü", "x" * 129, "a/b"])
def test_a_list_name_that_cannot_be_part_of_a_key_is_refused(way: str, name: str) -> None:
    with pytest.raises(ConfigError, match="a list of jobs needs a name"):
        build_queue(way, silent_url(way, 1), name)


# --- the bridge itself -------------------------------------------------------------------------


@pytest.fixture
def ask(rest_url: str) -> Iterator[Callable[..., tuple[int, Any]]]:
    """`ask("POST", "/pipeline", content=...)` gives status and JSON."""
    with httpx.Client(base_url=rest_url, trust_env=False) as client:

        def send(method: str, path: str, **more: Any) -> tuple[int, Any]:
            headers = {"Authorization": f"Bearer {TOKEN}"} | more.pop("headers", {})
            answer = client.request(method, path, headers=headers, **more)
            return answer.status_code, answer.json()

        yield send


def test_the_bridge_answers_as_upstash_documents(
    ask: Callable[..., tuple[int, Any]], name: str
) -> None:
    wrong = "WRONGTYPE Operation against a key holding the wrong kind of value"

    assert ask("GET", f"/set/{name}/a%2Fb") == (200, {"result": "OK"})
    assert ask("POST", f"/set/{name}?EX=100", content=b'["x"]') == (200, {"result": "OK"})
    assert ask("GET", f"/ttl/{name}") == (200, {"result": 100})
    assert ask("GET", f"/get/{name}") == (200, {"result": '["x"]'})
    assert ask("POST", "/", json=["GET", name]) == (200, {"result": '["x"]'})
    assert ask("GET", f"/get/{name}", headers={"Upstash-Encoding": "base64"}) == (
        200,
        {"result": "WyJ4Il0="},
    )
    assert ask("GET", f"/get/{name}-none") == (200, {"result": None})
    assert ask("GET", f"/llen/{name}") == (400, {"error": wrong})
    assert ask("POST", "/", json=["LLEN", name]) == (400, {"error": wrong})
    assert ask("GET", f"/get/{name}", headers={"Authorization": "Bearer x"})[0] == 401
    assert ask("DELETE", f"/get/{name}")[0] == 405
    assert ask("POST", "/", content=b"{")[0] == 400
    assert ask("POST", f"/set/{name}", content=b"\xff") == (200, {"result": "OK"})
    assert ask("GET", f"/get/{name}") == (200, {"result": "�"})


@pytest.mark.parametrize("path", ["/pipeline", "/multi-exec"])
def test_the_bridge_does_several_commands_as_upstash_documents(
    ask: Callable[..., tuple[int, Any]], name: str, path: str
) -> None:
    commands = [["SET", name, "x"], ["INCR", name], ["STRLEN", name]]

    answer = ask("POST", path, json=commands)

    refusal = {"error": "ERR value is not an integer or out of range"}
    assert answer == (200, [{"result": "OK"}, refusal, {"result": 1}])


def test_the_bridge_discards_a_transaction_with_an_unknown_command(
    ask: Callable[..., tuple[int, Any]], name: str
) -> None:
    status, body = ask("POST", "/multi-exec", json=[["SET", name, "x"], ["NO-SUCH-COMMAND"]])

    assert (status, body["error"].split()[0]) == (400, "EXECABORT")
    assert ask("GET", f"/exists/{name}") == (200, {"result": 0})
