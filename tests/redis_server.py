"""A real Redis server for tests: a process of its own on a free port, which saves nothing."""

from __future__ import annotations

import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
import redis

START_S = 10.0


class RedisServer:
    """`start`, `stop` and `kill` may follow each other; the port stays, the data do not."""

    def __init__(self, folder: Path, password: str | None = None, arguments: tuple[str, ...] = ()):
        """arguments: more of redis-server's own."""
        self.port = free_port()
        self._folder = folder
        self._password = password
        self._arguments = arguments
        self._process: subprocess.Popen[bytes] | None = None

    @property
    def url(self) -> str:
        secret = f":{self._password}@" if self._password else ""
        return f"redis://{secret}127.0.0.1:{self.port}/0"

    def client(self) -> redis.Redis:
        """For looking at what lies on the server; close it."""
        return redis.Redis.from_url(self.url, protocol=2)

    def start(self) -> None:
        command = ["redis-server", "--port", str(self.port), "--bind", "127.0.0.1"]
        command += ["--dir", str(self._folder), "--save", "", "--appendonly", "no"]
        if self._password:
            command += ["--requirepass", self._password]
        with (self._folder / "redis.log").open("ab") as log:
            self._process = subprocess.Popen(
                [*command, *self._arguments], stdin=subprocess.DEVNULL, stdout=log, stderr=log
            )
        self._wait_until_it_answers()

    def stop(self) -> None:
        self._end(signal.SIGTERM)

    def kill(self) -> None:
        self._end(signal.SIGKILL)

    def pause(self) -> None:
        """It keeps its connections and does nothing, until `resume`."""
        self._send(signal.SIGSTOP)

    def resume(self) -> None:
        self._send(signal.SIGCONT)

    def _send(self, number: signal.Signals) -> None:
        assert self._process is not None
        self._process.send_signal(number)

    def _end(self, number: signal.Signals) -> None:
        if self._process is not None:
            self._process.send_signal(number)
            self._process.wait(START_S)
            self._process = None

    def _wait_until_it_answers(self) -> None:
        assert self._process is not None
        deadline = time.monotonic() + START_S
        client = self.client()
        try:
            while True:
                try:
                    client.ping()
                    return
                except redis.ConnectionError:
                    if self._process.poll() is not None or time.monotonic() > deadline:
                        raise AssertionError((self._folder / "redis.log").read_text()) from None
                    time.sleep(0.01)
        finally:
            client.close()


@contextmanager
def running_redis(
    password: str | None = None, arguments: tuple[str, ...] = ()
) -> Iterator[RedisServer]:
    """A server that runs until the block ends. Skips the test where Redis is not installed."""
    if shutil.which("redis-server") is None:
        pytest.skip(
            "redis-server is not installed, so nothing that needs a real Redis is tested here; "
            "install it with `apt-get install redis-server` or `brew install redis`"
        )
    with tempfile.TemporaryDirectory(prefix="redis-") as folder:
        server = RedisServer(Path(folder), password, arguments)
        server.start()
        try:
            yield server
        finally:
            server.kill()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port
