"""The one transport: typed messages over ZeroMQ sockets in the run folder.

A `Server` binds a path and knows its peers by the connection they came in on; a `Client` connects
to one and learns at once when the other side dies, because the kernel closes the connection.
Neither is thread-safe: each belongs to the thread that polls it.
"""

from __future__ import annotations

import hashlib
import logging
import os
import socket
import stat
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import cast

import msgspec
import zmq
from zmq.utils.monitor import recv_monitor_message

from worker.errors import ConfigError
from worker.protocol.messages import VERSION, AnyMessage, Message

log = logging.getLogger(__name__)

# First frame of every message. A peer of another version is refused by name.
_TAG = f"verbatim/{VERSION}".encode()
# Messages that may wait for one peer, and as many again where it receives them. Whoever leaves more
# unread has stood still for minutes, and is hung up on; who sends more is refused with Busy long
# before.
_QUEUE_MESSAGES = 10_000
# Longest socket path that every supported system takes (sun_path is 104 bytes on macOS, 108 on
# Linux, with the closing zero).
_MAX_PATH_BYTES = 100

_encoder = msgspec.msgpack.Encoder()
_decoder = msgspec.msgpack.Decoder(AnyMessage)


@dataclass(frozen=True, slots=True)
class Peer:
    """A connection of a `Server`; valid until the other side goes away."""

    identity: bytes


class PeerGone(Exception):
    """The peer that a message was for has disconnected, or does not read and was hung up on."""


class NotConnected(Exception):
    """There is nobody at the other end of a `Client` now."""


@dataclass(frozen=True, slots=True)
class Connected:
    """A `Client` event: the other side is there; say `Hello`."""


@dataclass(frozen=True, slots=True)
class Disconnected:
    """A `Client` event: the other side is gone, and with it everything it had not answered."""


@dataclass(frozen=True, slots=True)
class _Connection:
    """What a peer came in on, so that it can be closed: ZeroMQ has no call for that."""

    descriptor: int  # ZeroMQ's own; another file may have the number once it is closed
    inode: int  # which tells that

    @property
    def is_open(self) -> bool:
        try:
            return os.fstat(self.descriptor).st_ino == self.inode
        except OSError:
            return False


class Server:
    """Receives messages from any number of peers. One thread.

    A peer that lets its queue run full is hung up on, so that it knows at once that something is
    lost, as if this process had died: nothing comes after a message that found no room. It may
    connect again, and is another peer then.
    """

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path):
        self._path = path
        path.unlink(missing_ok=True)  # left by a process that was killed; the name is ours alone
        self._socket = context.socket(zmq.ROUTER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUE_MESSAGES)
        # Without it a message for a peer that died is dropped without a word, and the engine
        # would go on working for nobody.
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(f"ipc://{path}")
        self._connections: dict[bytes, _Connection] = {}  # by identity; some may be closed

    @property
    def poll_target(self) -> zmq.Socket[bytes]:
        return self._socket

    def receive(self) -> tuple[Peer, Message] | None:
        """The next message, or None when none is waiting. What is no message is skipped."""
        while True:
            try:
                parts = self._socket.recv_multipart(zmq.NOBLOCK, copy=False)
            except zmq.Again:
                return None
            identity, *frames = (part.bytes for part in parts)
            if identity not in self._connections:
                self._meet(identity, parts[0].get(zmq.SRCFD))
            message = _decode(frames)
            if message is not None:
                return Peer(identity), message

    def send(self, peer: Peer, message: Message) -> None:
        """Never blocks. Raises PeerGone when the peer has disconnected, or is hung up on now."""
        try:
            self._socket.send_multipart(
                [peer.identity, _TAG, _encoder.encode(message)], zmq.NOBLOCK
            )
        except zmq.ZMQError as exc:
            if exc.errno == zmq.EAGAIN:
                self._hang_up(peer.identity)
            elif exc.errno != zmq.EHOSTUNREACH:
                raise
            raise PeerGone(str(exc)) from exc

    def _meet(self, identity: bytes, descriptor: int) -> None:
        self._connections = {known: one for known, one in self._connections.items() if one.is_open}
        try:
            inode = os.fstat(descriptor).st_ino
        except OSError:
            return  # it has gone already
        self._connections[identity] = _Connection(descriptor, inode)

    def _hang_up(self, identity: bytes) -> None:
        connection = self._connections.pop(identity, None)
        if connection is None or not connection.is_open:
            return  # it has gone, or is going
        log.error(
            "hung up on a process that has not read the last %d messages of %s",
            _QUEUE_MESSAGES, self._path.stem,
        )  # fmt: skip
        with socket.socket(fileno=os.dup(connection.descriptor)) as its:
            its.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()
        self._path.unlink(missing_ok=True)


class Client:
    """A connection to one `Server`, repeated for ever when it breaks. One thread."""

    def __init__(self, context: zmq.Context[zmq.Socket[bytes]], path: Path):
        self._socket = context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.setsockopt(zmq.SNDHWM, _QUEUE_MESSAGES)
        self._socket.setsockopt(zmq.RCVHWM, _QUEUE_MESSAGES)
        # A message for a dead engine must fail now, not wait in a queue and reach the next one.
        self._socket.setsockopt(zmq.IMMEDIATE, 1)
        self._socket.setsockopt(zmq.RECONNECT_IVL, 50)  # milliseconds
        self._socket.setsockopt(zmq.RECONNECT_IVL_MAX, 200)
        self._monitor = self._socket.get_monitor_socket(
            zmq.EVENT_HANDSHAKE_SUCCEEDED | zmq.EVENT_DISCONNECTED
        )
        self._socket.connect(f"ipc://{path}")

    @property
    def poll_targets(self) -> tuple[zmq.Socket[bytes], zmq.Socket[bytes]]:
        return self._socket, self._monitor

    def receive(self) -> Message | Connected | Disconnected | None:
        """The next message or change of the connection, or None when there is none.

        Messages come before the `Disconnected` that followed them.
        """
        message = self._receive_message()
        if message is not None:
            return message
        if self._late is not None:
            return self._take_late()
        event = self._receive_event()
        if isinstance(event, Disconnected):
            # What the peer sent before it died may have arrived between the two looks.
            self._late = event
            return self._receive_message() or self._take_late()
        return event

    _late: Disconnected | None = None

    def _take_late(self) -> Disconnected | None:
        late, self._late = self._late, None
        return late

    def _receive_message(self) -> Message | None:
        while True:
            try:
                frames = self._socket.recv_multipart(zmq.NOBLOCK)
            except zmq.Again:
                return None
            message = _decode(frames)
            if message is not None:
                return message

    def _receive_event(self) -> Connected | Disconnected | None:
        try:
            event = recv_monitor_message(self._monitor, zmq.NOBLOCK)
        except zmq.Again:
            return None
        up = event["event"] == zmq.EVENT_HANDSHAKE_SUCCEEDED
        return Connected() if up else Disconnected()

    def send(self, message: Message) -> None:
        """Raises NotConnected when nobody is there to take it, or to read what waits already."""
        try:
            self._socket.send_multipart([_TAG, _encoder.encode(message)], zmq.NOBLOCK)
        except zmq.Again as exc:
            raise NotConnected(str(exc)) from exc

    def answer_connected(self, message: Message) -> None:
        """Send the first message after `Connected`.

        The other side may be gone again by now; then `Disconnected` comes next, and nothing is
        lost.
        """
        try:
            self.send(message)
        except NotConnected:
            return

    def close(self) -> None:
        self._socket.disable_monitor()
        self._monitor.close()
        self._socket.close()


class Waker:
    """Lets other threads wake the thread that polls: it polls `fileno`, they call `wake`."""

    def __init__(self) -> None:
        self._read, self._write = socket.socketpair()
        self._read.setblocking(False)
        self._write.setblocking(False)

    def fileno(self) -> int:
        return self._read.fileno()

    def wake(self) -> None:
        try:
            self._write.send(b"\0")
        except BlockingIOError:
            return  # the buffer is full of wake-ups that the other side has yet to read

    def clear(self) -> None:
        try:
            while self._read.recv(4096):
                continue
        except BlockingIOError:
            return  # all read

    def close(self) -> None:
        self._read.close()
        self._write.close()


def run_dir(state_dir: Path) -> Path:
    """Path of the folder of the daemon's sockets; it may not exist.

    It lies in the system's folder for temporary files because a socket's path must be short, and
    is named by the state folder so that two daemons of two state folders never meet.
    """
    digest = hashlib.sha256(str(state_dir.resolve()).encode()).hexdigest()[:12]
    path = Path(tempfile.gettempdir()) / f"verbatim-{os.getuid()}-{digest}"
    if len(bytes(path)) + len("/front-media.sock") > _MAX_PATH_BYTES:
        path = Path("/tmp") / path.name
    return path


def make_run_dir(state_dir: Path) -> Path:
    """`run_dir`, made when missing and private to this user.

    Raises ConfigError when another user has put something there.
    """
    path = run_dir(state_dir)
    path.mkdir(mode=0o700, exist_ok=True)
    info = path.lstat()
    if not stat.S_ISDIR(info.st_mode) or info.st_uid != os.getuid() or info.st_mode & 0o077:
        raise ConfigError(f"{path} is not a folder that only this user can open; remove it")
    return path


def socket_path(state_dir: Path, name: str) -> Path:
    """Where the process called `name` ("engine chat") binds its `Server`."""
    return run_dir(state_dir) / f"{name.replace(' ', '-')}.sock"


def _decode(frames: list[bytes]) -> Message | None:
    if len(frames) != 2:
        log.error("refused a message of %d frames, this protocol has 2", len(frames))
        return None
    tag, payload = frames
    if tag != _TAG:
        shown = tag[:32].decode("ascii", "replace")
        log.error("refused a message of protocol %s, this is %s; restart the daemon", shown, _TAG)
        return None
    try:
        return cast(Message, _decoder.decode(payload))
    except msgspec.MsgspecError as exc:
        log.error("refused a message that cannot be read: %s", exc)
        return None
