"""Messages between processes over real sockets, and what happens when one side goes away."""

from __future__ import annotations

import select
import shutil
import socket
import tempfile
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, TypeVar, get_args

import msgspec
import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from worker.errors import ConfigError, EngineUnavailable
from worker.protocol import link as link_module
from worker.protocol import messages
from worker.protocol.link import (
    TYPICAL_START_S,
    EngineView,
    HungUp,
    Link,
    Mailbox,
    unavailable,
)
from worker.protocol.messages import (
    VERSION,
    AnyMessage,
    Cancel,
    EngineNotice,
    Failed,
    Hello,
    LoadModel,
    Message,
    ModelChanged,
    State,
    Token,
    Tokens,
)
from worker.protocol.transport import (
    Client,
    Connected,
    Disconnected,
    NotConnected,
    Peer,
    PeerGone,
    Server,
    Waker,
    make_run_dir,
    run_dir,
    socket_path,
)
from worker.supervisor.wire import ChildWire

# A busy machine is no reason to fail.
PATIENT: Any = {"deadline": None, "suppress_health_check": [HealthCheck.too_slow]}

T = TypeVar("T")
DEADLINE_S = 10.0
Context = zmq.Context[zmq.Socket[bytes]]


def until(look: Callable[[], T | None]) -> T:
    """What `look` finds, looked for until there is something; a test fails after DEADLINE_S."""
    ends = time.monotonic() + DEADLINE_S
    while time.monotonic() < ends:
        found = look()
        if found:
            return found
        time.sleep(0.002)
    raise AssertionError(f"nothing came within {DEADLINE_S:g} s")


@pytest.fixture
def path() -> Iterator[Path]:
    """Of a socket, short enough for every system."""
    folder = Path(tempfile.mkdtemp(prefix="vbt-"))
    yield folder / "e.sock"
    shutil.rmtree(folder)


@pytest.fixture
def context() -> Iterator[Context]:
    made: Context = zmq.Context()
    yield made
    made.destroy(linger=0)


@pytest.fixture
def open_server(context: Context, path: Path) -> Iterator[Callable[[], Server]]:
    opened: list[Server] = []

    def make() -> Server:
        opened.append(Server(context, path))
        return opened[-1]

    yield make
    for server in opened:
        server.close()


@pytest.fixture
def client(context: Context, path: Path) -> Iterator[Client]:
    made = Client(context, path)
    yield made
    made.close()


def state(status: str = "ready") -> State:
    return State(name="engine chat", pid=1, started_at=0.0, status=status)


# --- every message -----------------------------------------------------------------------------

ANYTHING = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(2**63), 2**64 - 1)
    | st.floats(allow_nan=False)
    | st.text(max_size=4),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=3), inner),
    max_leaves=4,
)


def values(kind: msgspec.inspect.Type) -> st.SearchStrategy[Any]:
    """Values of a field's type."""
    match kind:
        case msgspec.inspect.StrType():
            return st.text(max_size=6)
        case msgspec.inspect.BytesType():
            return st.binary(max_size=6)
        case msgspec.inspect.IntType():
            return st.integers(-(2**63), 2**64 - 1)
        case msgspec.inspect.FloatType():
            return st.floats(allow_nan=False)
        case msgspec.inspect.BoolType():
            return st.booleans()
        case msgspec.inspect.NoneType():
            return st.none()
        case msgspec.inspect.AnyType():
            return ANYTHING
        case msgspec.inspect.UnionType():
            return st.one_of([values(one) for one in kind.types])
        case msgspec.inspect.ListType():
            return st.lists(values(kind.item_type), max_size=3)
        case msgspec.inspect.VarTupleType():
            return st.lists(values(kind.item_type), max_size=3).map(tuple)
        case msgspec.inspect.TupleType():
            return st.tuples(*map(values, kind.item_types))
        case msgspec.inspect.DictType():
            return st.dictionaries(values(kind.key_type), values(kind.value_type), max_size=3)
        case msgspec.inspect.StructType():
            return st.builds(kind.cls, **{field.name: values(field.type) for field in kind.fields})
        case _:
            raise AssertionError(f"a message has a field of type {kind}")


KINDS = get_args(AnyMessage)


def test_every_message_can_be_received() -> None:
    defined = {kind for kind in Message.__subclasses__() if kind.__module__ == messages.__name__}

    assert set(KINDS) == defined


class Pair:
    """A server and a client that are connected."""

    def __init__(self, context: Context, path: Path):
        self.server, self.client = Server(context, path), Client(context, path)
        until(lambda: isinstance(self.client.receive(), Connected))
        self.client.send(Hello(peer="test"))
        self.peer, _ = until(self.server.receive)

    def close(self) -> None:
        self.client.close()
        self.server.close()


@pytest.fixture(scope="module")
def pair() -> Iterator[Pair]:
    folder = Path(tempfile.mkdtemp(prefix="vbt-"))
    context: Context = zmq.Context()
    made = Pair(context, folder / "p.sock")
    yield made
    made.close()
    context.destroy(linger=0)
    shutil.rmtree(folder)


@settings(max_examples=600, **PATIENT)
@given(message=st.one_of([values(msgspec.inspect.type_info(kind)) for kind in KINDS]))
def test_every_message_arrives_as_it_was_sent(pair: Pair, message: Message) -> None:
    pair.client.send(message)
    received = until(pair.server.receive)
    pair.server.send(pair.peer, message)
    returned = until(pair.client.receive)

    assert received == (pair.peer, message)
    assert returned == message
    assert type(returned) is type(message)


@pytest.mark.parametrize("kind", KINDS)
def test_a_message_cannot_be_changed(kind: type[Message]) -> None:
    assert kind.__struct_config__.frozen


# --- what is refused ---------------------------------------------------------------------------


def raw(context: Context, path: Path) -> zmq.Socket[bytes]:
    """A peer that says whatever a test wants."""
    made = context.socket(zmq.DEALER)
    made.setsockopt(zmq.LINGER, 0)
    made.connect(f"ipc://{path}")
    return made


@pytest.mark.parametrize(
    "frames",
    [
        [f"verbatim/{VERSION + 1}".encode(), msgspec.msgpack.encode(Hello(peer="x"))],
        [b"http/1.1", b""],
        [b"\xff\xfe" * 100, b""],
        [f"verbatim/{VERSION}".encode(), b"\xc1 garbage"],
        [f"verbatim/{VERSION}".encode(), msgspec.msgpack.encode({"type": "Nonsense"})],
        [f"verbatim/{VERSION}".encode(), msgspec.msgpack.encode({"type": "Hello", "peer": 3})],
        [f"verbatim/{VERSION}".encode()],
        [b"a", b"b", b"c"],
    ],
    ids=ascii,
)
def test_what_is_no_message_of_this_version_is_refused_and_the_next_one_taken(
    context: Context,
    path: Path,
    open_server: Callable[[], Server],
    frames: list[bytes],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = open_server()
    peer = raw(context, path)

    peer.send_multipart(frames)
    peer.send_multipart(
        [f"verbatim/{VERSION}".encode(), msgspec.msgpack.encode(Hello(peer="good"))]
    )
    _, message = until(server.receive)

    assert message == Hello(peer="good")
    assert "refused" in caplog.text
    peer.close()


def test_a_peer_of_another_version_is_refused_by_name(
    context: Context,
    path: Path,
    open_server: Callable[[], Server],
    caplog: pytest.LogCaptureFixture,
) -> None:
    server = open_server()
    peer = raw(context, path)

    peer.send_multipart([b"verbatim/999", msgspec.msgpack.encode(Hello(peer="x"))])
    until(lambda: server.receive() is not None or "refused" in caplog.text)

    assert "verbatim/999" in caplog.text
    peer.close()


# --- coming and going --------------------------------------------------------------------------


def test_a_client_learns_when_the_server_comes_goes_and_comes_back(
    client: Client, open_server: Callable[[], Server]
) -> None:
    assert client.receive() is None
    server = open_server()
    assert until(client.receive) == Connected()

    server.close()
    assert until(client.receive) == Disconnected()
    open_server()

    assert until(client.receive) == Connected()


def test_nothing_can_be_sent_to_nobody(client: Client, open_server: Callable[[], Server]) -> None:
    with pytest.raises(NotConnected):
        client.send(Hello(peer="x"))

    server = open_server()
    until(client.receive)
    client.send(Hello(peer="x"))
    server.close()
    until(lambda: client.receive() == Disconnected())

    with pytest.raises(NotConnected):
        client.send(Hello(peer="x"))


def test_what_was_meant_for_a_dead_server_does_not_reach_the_next_one(
    client: Client, open_server: Callable[[], Server]
) -> None:
    first = open_server()
    until(client.receive)
    client.send(Cancel(request_id="old"))
    first.close()
    until(lambda: client.receive() == Disconnected())

    second = open_server()
    until(client.receive)
    client.send(Cancel(request_id="new"))

    _, message = until(second.receive)
    assert message == Cancel(request_id="new")


def test_messages_come_in_order_and_before_the_end_of_the_connection(
    client: Client, open_server: Callable[[], Server]
) -> None:
    server = open_server()
    until(client.receive)
    client.send(Hello(peer="x"))
    peer, _ = until(server.receive)
    for number in range(500):
        server.send(peer, Token(request_id="r", text="x", completion_tokens=number))
    first = until(client.receive)

    server.close()
    events: list[object] = [first]
    until(lambda: events.append(client.receive()) or events[-1] == Disconnected())

    tokens = [event for event in events if isinstance(event, Token)]
    assert [token.completion_tokens for token in tokens] == list(range(len(tokens)))
    assert [event for event in events if event is not None][-1] == Disconnected()


def test_a_server_learns_that_a_peer_is_gone_when_it_answers(
    context: Context, path: Path, open_server: Callable[[], Server]
) -> None:
    server = open_server()
    leaving = Client(context, path)
    until(leaving.receive)
    leaving.send(Hello(peer="x"))
    peer, _ = until(server.receive)
    leaving.close()

    def refused() -> bool:
        try:
            server.send(peer, state())
        except PeerGone:
            return True
        return False

    assert until(refused)


def test_a_server_tells_its_peers_apart(
    context: Context, path: Path, open_server: Callable[[], Server]
) -> None:
    server = open_server()
    clients = [Client(context, path) for _ in range(2)]
    peers: list[Peer] = []
    for number, one in enumerate(clients):
        until(one.receive)
        one.send(Hello(peer=str(number)))
        peers.append(until(server.receive)[0])

    for number, peer in enumerate(peers):
        server.send(peer, Cancel(request_id=str(number)))

    assert [until(one.receive) for one in clients] == [
        Cancel(request_id="0"),
        Cancel(request_id="1"),
    ]
    for one in clients:
        one.close()


def test_a_socket_that_a_killed_process_left_is_in_nobodys_way(
    path: Path, open_server: Callable[[], Server], client: Client
) -> None:
    with socket.socket(socket.AF_UNIX) as left:
        left.bind(str(path))

    open_server()

    assert until(client.receive) == Connected()


def test_a_server_that_ends_in_order_leaves_no_socket(
    path: Path, open_server: Callable[[], Server]
) -> None:
    server = open_server()
    assert path.exists()

    server.close()

    assert not path.exists()


def test_closing_leaves_no_socket_open(context: Context, path: Path) -> None:
    server, client = Server(context, path), Client(context, path)
    until(client.receive)

    targets = [server.poll_target, *client.poll_targets]
    client.close()
    server.close()

    assert [target.closed for target in targets] == [True, True, True]


# --- the folder of the sockets -----------------------------------------------------------------


@pytest.fixture
def temporary(monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The system's folder for temporary files, for this test alone."""
    folder = Path(tempfile.mkdtemp(prefix="vbt-"))
    monkeypatch.setattr(tempfile, "tempdir", str(folder))
    yield folder
    shutil.rmtree(folder)


def test_the_sockets_lie_in_a_folder_that_only_this_user_can_open(temporary: Path) -> None:
    folder = make_run_dir(Path("/srv/state"))

    assert folder.parent == temporary
    assert folder.stat().st_mode & 0o777 == 0o700
    assert make_run_dir(Path("/srv/state")) == folder


def test_who_only_asks_for_the_folder_makes_none(temporary: Path) -> None:
    folder = run_dir(Path("/srv/state"))

    assert not folder.exists()
    assert make_run_dir(Path("/srv/state")) == folder


def test_two_state_folders_have_two_folders_of_sockets(temporary: Path) -> None:
    assert run_dir(Path("/srv/one")) != run_dir(Path("/srv/two"))


def test_a_folder_that_others_can_open_is_refused(temporary: Path) -> None:
    folder = make_run_dir(Path("/srv/state"))
    folder.chmod(0o755)

    with pytest.raises(ConfigError, match="not a folder that only this user can open"):
        make_run_dir(Path("/srv/state"))


def test_a_link_in_place_of_the_folder_is_refused(temporary: Path) -> None:
    folder = run_dir(Path("/srv/state"))
    (temporary / "elsewhere").mkdir(mode=0o700)
    folder.symlink_to(temporary / "elsewhere")

    with pytest.raises(ConfigError, match="not a folder that only this user can open"):
        make_run_dir(Path("/srv/state"))


def test_every_process_has_a_path_of_its_own_that_fits_a_socket(temporary: Path) -> None:
    names = ("engine chat", "engine media", "front chat", "front media", "orchestrator")

    paths = {socket_path(Path("/srv/state"), name) for name in names}

    assert len(paths) == len(names)
    assert all(len(bytes(path)) <= 103 for path in paths)
    assert all(" " not in path.name for path in paths)


def test_a_long_folder_for_temporary_files_is_not_used(
    temporary: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(temporary / ("x" * 80)))

    path = socket_path(temporary / "state", "front media")

    assert len(bytes(path)) <= 103


# --- waking ------------------------------------------------------------------------------------


def test_a_waker_wakes_who_polls_it_until_it_is_cleared() -> None:
    waker = Waker()
    poll = select.poll()
    poll.register(waker.fileno(), select.POLLIN)
    assert poll.poll(0) == []

    waker.wake()
    assert poll.poll(0)
    waker.clear()

    assert poll.poll(0) == []
    waker.close()


def test_any_number_of_wake_ups_never_blocks() -> None:
    waker = Waker()

    for _ in range(300_000):  # more than any socket buffer takes
        waker.wake()
    waker.clear()

    poll = select.poll()
    poll.register(waker.fileno(), select.POLLIN)
    assert poll.poll(0) == []
    waker.close()


# --- a mailbox ---------------------------------------------------------------------------------


@pytest.fixture
def mailbox() -> Iterator[Mailbox]:
    made = Mailbox("r")
    yield made
    made.close()


@pytest.fixture
def connection() -> Iterator[tuple[socket.socket, socket.socket]]:
    """An HTTP connection: our end and the client's."""
    ours, theirs = socket.socketpair()
    with ours, theirs:
        yield ours, theirs


def token(number: int) -> Token:
    return Token(request_id="r", text=str(number), completion_tokens=number)


def test_a_mailbox_gives_its_events_in_order(mailbox: Mailbox) -> None:
    for number in range(3):
        mailbox.put(token(number))

    assert [mailbox.wait(0) for _ in range(3)] == [token(0), token(1), token(2)]
    assert mailbox.wait(0) is None


def test_an_empty_mailbox_gives_nothing_when_the_time_is_up(mailbox: Mailbox) -> None:
    began = time.monotonic()

    event = mailbox.wait(0.03)

    assert event is None
    assert time.monotonic() - began >= 0.03


def test_an_event_of_another_thread_ends_the_wait(mailbox: Mailbox) -> None:
    thread = threading.Thread(target=lambda: mailbox.put(token(1)))
    thread.start()

    event = mailbox.wait(DEADLINE_S)

    assert event == token(1)
    thread.join()


def test_a_client_that_hangs_up_ends_the_wait(
    mailbox: Mailbox, connection: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = connection
    theirs.close()

    with pytest.raises(HungUp):
        mailbox.wait(DEADLINE_S, ours)


def test_a_client_that_hangs_up_during_the_wait_ends_it(
    mailbox: Mailbox, connection: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = connection
    thread = threading.Thread(target=theirs.close)
    thread.start()

    with pytest.raises(HungUp):
        mailbox.wait(DEADLINE_S, ours)
    thread.join()


def test_an_event_that_is_there_comes_before_the_hang_up(
    mailbox: Mailbox, connection: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = connection
    mailbox.put(token(1))
    theirs.close()

    assert mailbox.wait(DEADLINE_S, ours) == token(1)
    with pytest.raises(HungUp):
        mailbox.wait(DEADLINE_S, ours)


def test_a_client_that_sends_more_has_not_hung_up(
    mailbox: Mailbox, connection: tuple[socket.socket, socket.socket]
) -> None:
    ours, theirs = connection
    theirs.send(b"GET /health HTTP/1.1\r\n")

    assert mailbox.wait(0.02, ours) is None


# --- what is known of an engine ----------------------------------------------------------------


@pytest.mark.parametrize(
    ("view", "seconds"),
    [
        (EngineView("e"), TYPICAL_START_S),
        (EngineView("e", lost_at=98.0), TYPICAL_START_S - 2.0),
        (EngineView("e", lost_at=98.0, start_s=30.0), 28.0),
        (EngineView("e", lost_at=10.0), 1.0),
        (EngineView("e", notice=EngineNotice(name="e", cause="x", next_try_s=8.0)), 14.0),
        (
            EngineView("e", notice=EngineNotice(name="e", cause="x", next_try_s=8.0), start_s=4.0),
            12.0,
        ),
    ],
)
def test_the_time_until_an_engine_is_back_is_told_from_what_is_known(
    view: EngineView, seconds: float
) -> None:
    assert view.retry_after_s(100.0) == seconds


def test_an_engine_that_starts_is_said_to_start() -> None:
    error = unavailable(EngineView("engine chat"), 100.0)

    assert str(error) == "the engine chat process is starting"
    assert error.retry_after_s == TYPICAL_START_S


def test_an_engine_that_is_down_is_told_with_its_cause_and_its_next_try() -> None:
    notice = EngineNotice(name="engine chat", cause="exited with code 1", next_try_s=8.0)

    error = unavailable(EngineView("engine chat", notice=notice), 100.0)

    assert str(error) == ("the engine chat process is down (exited with code 1); next try in 8 s")
    assert error.retry_after_s == 14.0


def test_an_engine_that_is_given_up_has_no_time_to_come_back() -> None:
    notice = EngineNotice(name="engine chat", cause="exited with code 3", next_try_s=None)

    error = unavailable(EngineView("engine chat", notice=notice), 100.0)

    assert "will not be tried again: exited with code 3" in str(error)
    assert error.retry_after_s is None


# --- a link ------------------------------------------------------------------------------------


class Engine:
    """The other end of a link, by hand."""

    def __init__(self, server: Server):
        self._server = server
        self._peer: Peer | None = None

    def expect(self, kind: type[Message]) -> Message:
        """The next message, which must be of this kind."""
        self._peer, message = until(self._server.receive)
        assert type(message) is kind
        return message

    def greet(self) -> None:
        self.expect(Hello)
        self.say(state())

    def say(self, message: Message) -> None:
        assert self._peer is not None
        self._server.send(self._peer, message)

    def close(self) -> None:
        self._server.close()


@pytest.fixture
def link(context: Context, path: Path) -> Iterator[Link]:
    made = Link(context, path, "front chat", "engine chat")
    yield made
    made.close()


@pytest.fixture
def open_engine(open_server: Callable[[], Server], link: Link) -> Callable[[], Engine]:
    """Opens the engine's end and waits until the link knows it."""

    def make() -> Engine:
        engine = Engine(open_server())
        engine.greet()
        until(lambda: link.view.state is not None)
        return engine

    return make


def load(number: int = 1) -> LoadModel:
    return LoadModel(request_id=f"r{number}", model="m")


def loaded(number: int = 1) -> ModelChanged:
    return ModelChanged(request_id=f"r{number}", model="m", changed=True, seconds=0.5)


def test_a_link_says_who_it_is_and_knows_the_engine_by_its_state(
    link: Link, open_server: Callable[[], Server]
) -> None:
    engine = Engine(open_server())

    hello = engine.expect(Hello)
    assert link.view.state is None
    engine.say(state("loading"))

    assert hello == Hello(peer="front chat")
    until(lambda: link.view.state == state("loading"))
    engine.say(state("ready"))
    until(lambda: link.view.state == state("ready"))


def test_a_request_gets_its_own_events_in_order(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    engine = open_engine()
    one, two = link.submit(load(1)), link.submit(load(2))
    assert [engine.expect(LoadModel), engine.expect(LoadModel)] == [load(1), load(2)]

    engine.say(Token(request_id="r2", text="b", completion_tokens=1))
    engine.say(loaded(1))
    engine.say(loaded(2))

    assert one.wait(DEADLINE_S) == loaded(1)
    assert two.wait(DEADLINE_S) == Token(request_id="r2", text="b", completion_tokens=1)
    assert two.wait(DEADLINE_S) == loaded(2)
    link.release(one)
    link.release(two)


def test_tokens_that_come_together_reach_each_its_request(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    engine = open_engine()
    one, two = link.submit(load(1)), link.submit(load(2))
    tokens = tuple(
        Token(request_id=name, text=f"for {name}", completion_tokens=1)
        for name in ("r1", "nobody", "r2")
    )

    engine.say(Tokens(tokens=tokens))

    assert one.wait(DEADLINE_S) == tokens[0]
    assert two.wait(DEADLINE_S) == tokens[2]
    link.release(one)
    link.release(two)


def test_an_event_that_nobody_waits_for_is_dropped(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    engine = open_engine()
    mailbox = link.submit(load(1))
    engine.expect(LoadModel)

    engine.say(loaded(99))
    engine.say(loaded(1))

    assert mailbox.wait(DEADLINE_S) == loaded(1)
    link.release(mailbox)


def test_a_cancellation_reaches_the_engine(link: Link, open_engine: Callable[[], Engine]) -> None:
    engine = open_engine()
    mailbox = link.submit(load(1))
    engine.expect(LoadModel)

    link.cancel("r1")

    assert engine.expect(Cancel) == Cancel(request_id="r1")
    link.release(mailbox)


def test_a_released_request_is_forgotten(link: Link, open_engine: Callable[[], Engine]) -> None:
    engine = open_engine()
    first = link.submit(load(1))
    engine.expect(LoadModel)
    link.release(first)
    again = link.submit(load(2))
    engine.expect(LoadModel)  # by now the release has been done

    engine.say(loaded(1))
    engine.say(loaded(2))

    assert again.wait(DEADLINE_S) == loaded(2)
    link.release(again)


def test_without_an_engine_a_request_fails_at_once_with_when_to_come_again(link: Link) -> None:
    mailbox = link.submit(load(1))

    event = mailbox.wait(DEADLINE_S)

    assert isinstance(event, Failed)
    assert (event.request_id, event.code, event.status) == ("r1", "engine_unavailable", 503)
    assert event.error == "the engine chat process is starting"
    assert event.retry_after_s is not None
    assert 1.0 <= event.retry_after_s <= TYPICAL_START_S
    with pytest.raises(EngineUnavailable):
        link.require_connected()
    link.release(mailbox)


def test_an_engine_that_has_not_yet_said_how_it_is_gets_no_request(
    link: Link, open_server: Callable[[], Server]
) -> None:
    engine = Engine(open_server())
    engine.expect(Hello)

    mailbox = link.submit(load(1))

    event = mailbox.wait(DEADLINE_S)
    assert isinstance(event, Failed)
    assert event.code == "engine_unavailable"
    link.release(mailbox)


def test_a_cancellation_without_an_engine_harms_nothing(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    link.cancel("r1")
    mailbox = link.submit(load(1))
    assert isinstance(mailbox.wait(DEADLINE_S), Failed)  # by now the cancellation has been done
    link.release(mailbox)

    open_engine()

    link.require_connected()


def test_when_the_engine_dies_every_request_on_it_fails(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    engine = open_engine()
    mailboxes = [link.submit(load(number)) for number in range(3)]
    for _ in mailboxes:
        engine.expect(LoadModel)

    engine.close()

    for number, mailbox in enumerate(mailboxes):
        event = mailbox.wait(DEADLINE_S)
        assert isinstance(event, Failed)
        assert (event.request_id, event.code, event.status) == (f"r{number}", "engine_lost", 503)
        assert event.retry_after_s is not None
        link.release(mailbox)
    until(lambda: link.view.state is None)


def test_a_lost_request_fails_once_however_often_engines_die(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    engine = open_engine()
    mailbox = link.submit(load(1))
    engine.expect(LoadModel)
    engine.close()
    first = mailbox.wait(DEADLINE_S)

    open_engine().close()
    until(lambda: link.view.state is None)

    assert isinstance(first, Failed)
    assert mailbox.wait(0.02) is None
    link.release(mailbox)


def test_what_the_engine_said_before_it_died_comes_first(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    engine = open_engine()
    mailbox = link.submit(load(1))
    engine.expect(LoadModel)
    engine.say(Token(request_id="r1", text="a", completion_tokens=1))
    first = mailbox.wait(DEADLINE_S)

    engine.close()
    last = mailbox.wait(DEADLINE_S)

    assert isinstance(first, Token)
    assert isinstance(last, Failed)
    assert mailbox.wait(0.01) is None
    link.release(mailbox)


def test_when_the_engine_is_back_requests_work_again(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    open_engine().close()
    until(lambda: link.view.state is None)

    engine = open_engine()
    link.require_connected()
    mailbox = link.submit(load(1))
    engine.expect(LoadModel)
    engine.say(loaded(1))

    assert mailbox.wait(DEADLINE_S) == loaded(1)
    link.release(mailbox)


def test_a_request_may_use_an_id_again_after_the_engine_was_lost(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    first = open_engine()
    lost = link.submit(load(1))
    first.expect(LoadModel)
    first.close()
    lost.wait(DEADLINE_S)
    link.release(lost)

    engine = open_engine()
    again = link.submit(load(1))
    engine.expect(LoadModel)
    engine.say(loaded(1))

    assert again.wait(DEADLINE_S) == loaded(1)
    link.release(again)


def test_what_the_orchestrator_knows_is_told_until_the_engine_is_back(
    link: Link, open_engine: Callable[[], Engine]
) -> None:
    notice = EngineNotice(name="engine chat", cause="exited with code 1", next_try_s=8.0)
    link.note(notice)
    until(lambda: link.view.notice == notice)
    mailbox = link.submit(load(1))

    event = mailbox.wait(DEADLINE_S)

    assert isinstance(event, Failed)
    assert "exited with code 1" in event.error
    link.release(mailbox)
    open_engine()
    assert link.view.notice is None


def test_a_notice_without_a_cause_takes_the_last_one_back(link: Link) -> None:
    link.note(EngineNotice(name="engine chat", cause="exited with code 1", next_try_s=8.0))
    until(lambda: link.view.notice is not None)

    link.note(EngineNotice(name="engine chat", cause=None))

    until(lambda: link.view.notice is None)


def test_many_threads_share_one_link(link: Link, open_engine: Callable[[], Engine]) -> None:
    engine = open_engine()
    answers: dict[int, Message | None] = {}

    def request(number: int) -> None:
        mailbox = link.submit(load(number))
        answers[number] = mailbox.wait(DEADLINE_S)
        link.release(mailbox)

    threads = [threading.Thread(target=request, args=(number,)) for number in range(30)]
    for thread in threads:
        thread.start()
    for _ in threads:
        message = engine.expect(LoadModel)
        assert isinstance(message, LoadModel)
        engine.say(loaded(int(message.request_id[1:])))
    for thread in threads:
        thread.join(timeout=DEADLINE_S)

    assert answers == {number: loaded(number) for number in range(30)}


# --- a peer that is gone before it is greeted --------------------------------------------------


class FakeClient(Client):
    """A connection that a test writes: what it receives, and how often sending fails."""

    def __init__(self, events: list[Message | Connected | Disconnected], failures: int):
        self._events = deque(events)
        self._failures = failures
        self._waker = Waker()
        self._waker.wake()
        self.sent: list[Message] = []

    @property
    def poll_targets(self) -> Any:
        return (self._waker.fileno(),)

    def receive(self) -> Message | Connected | Disconnected | None:
        return self._events.popleft() if self._events else None

    def send(self, message: Message) -> None:
        if self._failures:
            self._failures -= 1
            raise NotConnected("gone")
        self.sent.append(message)

    def close(self) -> None:
        self._waker.close()


@pytest.mark.filterwarnings("error::pytest.PytestUnhandledThreadExceptionWarning")
def test_a_link_survives_an_engine_that_is_gone_before_it_is_greeted(
    context: Context, path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake = FakeClient([Connected(), Disconnected(), Connected(), state()], failures=1)
    monkeypatch.setattr(link_module, "Client", lambda *_: fake)

    link = Link(context, path, "front chat", "engine chat")

    until(lambda: link.view.state == state())
    assert fake.sent == [Hello(peer="front chat")]
    link.close()


def test_the_orchestrator_survives_a_child_that_is_gone_before_it_is_greeted(
    context: Context, temporary: Path
) -> None:
    folder = temporary / "state"
    make_run_dir(folder)
    wire = ChildWire(context, folder, ["engine chat"])
    targets = Targets()
    wire.register(targets)
    messages_socket = targets.sockets[0]
    server = Server(context, socket_path(folder, "engine chat"))
    until(lambda: messages_socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT)
    server.close()
    until(lambda: not messages_socket.getsockopt(zmq.EVENTS) & zmq.POLLOUT)

    heard = until(wire.receive)

    assert heard == [("engine chat", None)]
    wire.close()


class Targets:
    """Stands in for a poller and keeps the sockets it is to watch."""

    def __init__(self) -> None:
        self.sockets: list[zmq.Socket[bytes]] = []

    def register(self, target: zmq.Socket[bytes], _flags: int) -> None:
        self.sockets.append(target)
