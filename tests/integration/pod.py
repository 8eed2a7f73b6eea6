"""The processes of jobs without the rest: front, runner and a toy engine, each of which can be
killed and started again at once, with a real Redis and stand-ins of the services around."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import zmq

from tests.integration.daemon import eventually, free_ports
from worker.config import CONFIGS, REPOSITORY
from worker.lifeline import PARENT_VARIABLE
from worker.protocol.messages import Hello, State
from worker.protocol.transport import (
    Client,
    Connected,
    make_run_dir,
    run_dir,
    socket_path,
)

PROCESSES = ("runner", "engine", "front")
START_S = 30.0


class Pod:
    """Owned by the test's thread."""

    def __init__(self, folder: Path, environment: dict[str, str], step_s: float):
        """environment: services that are configured. step_s: of the toy engine."""
        self.state_dir = folder / "state"
        _, port = free_ports(2)
        self.url = f"http://127.0.0.1:{port}"
        self._profile = folder / "pod.toml"
        demo = (CONFIGS / "demo.toml").read_text()
        self._profile.write_text(demo.replace("keep_finished = 200", "keep_finished = 100000"))
        self._step_s = step_s
        self._environment = {
            **{name: value for name, value in os.environ.items() if "SUPABASE" not in name},
            "VERBATIM_STATE_DIR": str(self.state_dir),
            "VERBATIM_MEDIA_PORT": str(port),
            PARENT_VARIABLE: str(os.getpid()),
            "PYTHONPATH": str(REPOSITORY),
            **environment,
        }
        self._log = (folder / "pod.log").open("ab")
        self.log_path = folder / "pod.log"
        self._running: dict[str, subprocess.Popen[bytes]] = {}
        make_run_dir(self.state_dir)

    def start(self, name: str) -> None:
        socket = socket_path(self.state_dir, "engine media")
        command = {
            "runner": ["-m", "worker.jobs", "--profile", str(self._profile)],
            "front": ["-m", "worker.front", "media", "--profile", str(self._profile)],
            "engine": ["-m", "tests.integration.toy_engine", str(socket), str(self._step_s)],
        }[name]
        self._running[name] = subprocess.Popen(
            [sys.executable, *command], cwd=REPOSITORY, env=self._environment,
            stdin=subprocess.DEVNULL, stdout=self._log, stderr=self._log,
        )  # fmt: skip

    def kill(self, name: str) -> None:
        self._running[name].kill()
        self._running.pop(name).wait()

    def end(self, name: str) -> int:
        """SIGTERM; its exit code."""
        process = self._running.pop(name)
        process.send_signal(signal.SIGTERM)
        return process.wait(START_S)

    def wait_until_back(self, name: str) -> None:
        """Until it answers."""
        if name == "front":
            eventually(self._front_answers, START_S, self.describe)
            return
        role = "runner" if name == "runner" else "engine media"
        client = Client(zmq.Context.instance(), socket_path(self.state_dir, role))
        try:
            eventually(lambda: _says_ready(client), START_S, self.describe)
        finally:
            client.close()

    def get(self, path: str) -> httpx.Response:
        """Asked again while the front is away."""
        return self._until_answered("GET", path)

    def post(self, body: dict[str, Any]) -> httpx.Response:
        return self._until_answered("POST", "/generate", json=body)

    def describe(self) -> str:
        return self.log_path.read_text("utf-8", "replace")[-6000:]

    def close(self) -> None:
        for name in list(self._running):
            self.kill(name)
        self._log.close()
        for path in run_dir(self.state_dir).glob("*"):
            path.unlink()
        run_dir(self.state_dir).rmdir()

    def _front_answers(self) -> bool:
        try:
            return httpx.get(f"{self.url}/status", timeout=5).status_code == 200
        except httpx.TransportError:
            return False

    def _until_answered(self, method: str, path: str, **more: Any) -> httpx.Response:
        ends = time.monotonic() + START_S
        while True:
            try:
                return httpx.request(method, f"{self.url}{path}", timeout=10, **more)
            except httpx.TransportError:
                assert time.monotonic() < ends, self.describe()
                time.sleep(0.01)


@contextmanager
def running_pod(folder: Path, environment: dict[str, str], step_s: float = 0.01) -> Iterator[Pod]:
    pod = Pod(folder, environment, step_s)
    try:
        for name in PROCESSES:
            pod.start(name)
        for name in PROCESSES:
            pod.wait_until_back(name)
        yield pod
    finally:
        pod.close()


def as_pushed(body: dict[str, Any]) -> str:
    """An element as the current producer stores it: an array of one JSON text."""
    return json.dumps([json.dumps(body)])


def _says_ready(client: Client) -> bool:
    while (event := client.receive()) is not None:
        if isinstance(event, Connected):
            client.answer_connected(Hello(peer="test"))
        elif isinstance(event, State):
            return event.status == "ready"
    return False
