"""A real daemon for tests: orchestrator.py with its own ports and folders."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx
import psutil

from tests.integration.endless import demo_profile
from worker.config import CONFIGS, KEY_NAMES, REPOSITORY
from worker.protocol.transport import run_dir

T = TypeVar("T")
START_S = 60.0
STOP_S = 40.0


class Daemon:
    """One running orchestrator and two HTTP clients."""

    def __init__(self, process: subprocess.Popen[str], environment: dict[str, str], output: Path):
        self.process = process
        self.environment = environment
        self.output = output
        self.state_dir = Path(environment["VERBATIM_STATE_DIR"])
        self.chat_url = f"http://127.0.0.1:{environment['VERBATIM_CHAT_PORT']}"
        self.media_url = f"http://127.0.0.1:{environment['VERBATIM_MEDIA_PORT']}"
        self.gateway_url = f"http://127.0.0.1:{environment['GATEWAY_PORT']}"
        self.chat = httpx.Client(base_url=self.chat_url, timeout=60)
        self.media = httpx.Client(base_url=self.media_url, timeout=100)

    def child(self, name: str) -> psutil.Process:
        """The child process called `name`, by its command line as `ps` shows it."""
        for process in psutil.Process(self.process.pid).children():
            if name in " ".join(process.cmdline()):
                return process
        raise AssertionError(f"no child is called {name}")

    def family(self) -> list[psutil.Process]:
        return psutil.Process(self.process.pid).children(recursive=True)

    def wait_until_ready(self) -> None:
        for client in (self.chat, self.media):
            eventually(lambda client=client: _is_healthy(client), START_S, self.describe)

    def log(self, name: str) -> str:
        return (self.state_dir / "logs" / f"{name}.log").read_text()

    def describe(self) -> str:
        logs = [path.read_text()[-2000:] for path in (self.state_dir / "logs").glob("*.log")]
        return "\n".join([self.output.read_text()[-2000:], *logs])

    def stop(self, number: int = signal.SIGTERM) -> int:
        """Signal the orchestrator and wait for its end; returns its exit code."""
        self.process.send_signal(number)
        return self.process.wait(STOP_S)

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """Another orchestrator.py with the same environment."""
        return subprocess.run(
            [sys.executable, str(REPOSITORY / "orchestrator.py"), *arguments],
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=STOP_S,
        )


@contextmanager
def running_daemon(
    folder: Path,
    change: Callable[[str], str] = lambda text: text,
    ready: bool = True,
    gateway: bool = False,
    **variables: str,
) -> Iterator[Daemon]:
    """Start a daemon in `folder`, wait until it is ready, and leave nothing behind.

    It runs the demo profile with the model "endless" beside the demo models.
    change: what to change in the profile's text. gateway: whether the prompt gateway runs, too.
    """
    profile = folder / "demo.toml"
    environment = daemon_environment(folder, **variables)
    text = demo_profile((CONFIGS / "demo.toml").read_text())
    if gateway:
        text = text.replace("127.0.0.1:7862", f"127.0.0.1:{environment['GATEWAY_PORT']}")
    else:
        text = without_gateway(text)
    profile.write_text(change(text))
    output = folder / "orchestrator.out"
    with output.open("w") as out:
        process = subprocess.Popen(
            [sys.executable, str(REPOSITORY / "orchestrator.py"), "--profile", str(profile)],
            env=environment,
            stdout=out,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            start_new_session=True,
        )
    daemon = Daemon(process, environment, output)
    try:
        if ready:
            daemon.wait_until_ready()
        yield daemon
    finally:
        if process.poll() is None:
            process.terminate()
            try:
                process.wait(STOP_S)
            finally:
                if process.poll() is None:
                    process.kill()
                    process.wait()
        daemon.chat.close()
        daemon.media.close()
        for path in run_dir(daemon.state_dir).glob("*"):
            path.unlink()
        if run_dir(daemon.state_dir).exists():
            run_dir(daemon.state_dir).rmdir()


def without_gateway(profile: str) -> str:
    """The profile's text without [gateway] and its parts."""
    kept = []
    is_in = False
    for line in profile.splitlines(keepends=True):
        if line.startswith("["):
            is_in = line.startswith("[gateway")
        if not is_in:
            kept.append(line)
    return "".join(kept)


def daemon_environment(folder: Path, **variables: str) -> dict[str, str]:
    """This process's environment without its keys, with ports and folders of its own."""
    chat_port, media_port, gateway_port = free_ports(3)
    inherited = {name: value for name, value in os.environ.items() if name not in KEY_NAMES}
    return inherited | {
        "VERBATIM_STATE_DIR": str(folder / "state"),
        "VERBATIM_CHAT_PORT": str(chat_port),
        "VERBATIM_MEDIA_PORT": str(media_port),
        "GATEWAY_PORT": str(gateway_port),
        **variables,
    }


def free_ports(count: int) -> list[int]:
    """Ports of 127.0.0.1 that nobody listens on now."""
    probes = [socket.create_server(("127.0.0.1", 0)) for _ in range(count)]
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


def eventually(
    look: Callable[[], T], within_s: float, describe: Callable[[], str] = lambda: ""
) -> T:
    """The first true value of `look`; fails with `describe()` when there is none in time."""
    ends = time.monotonic() + within_s
    while True:
        value = look()
        if value:
            return value
        if time.monotonic() > ends:
            raise AssertionError(f"not within {within_s} s\n{describe()}")
        time.sleep(0.05)


def answer_of(client: httpx.Client, path: str) -> dict[str, Any] | None:
    """The JSON of a GET, or None while nobody listens."""
    try:
        body: dict[str, Any] = client.get(path).json()
    except httpx.TransportError:
        return None
    return body


def _is_healthy(client: httpx.Client) -> bool:
    body = answer_of(client, "/health")
    return body is not None and body["status"] == "healthy"
