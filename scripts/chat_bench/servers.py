"""The servers that the chat benchmark compares, each started on the same model folder."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, Protocol

from chat_bench.workloads import Ask, messages

REPOSITORY = Path(__file__).resolve().parents[2]
START_S = 300.0


class Server(Protocol):
    """Something that answers requests; while it is paused it uses no processor."""

    name: str

    def answer(self, ask: Ask) -> int:
        """Run one request to its end, greedily; returns the number of new tokens. Any thread."""
        ...

    def pause(self) -> None: ...

    def resume(self) -> None: ...

    def stop(self) -> None: ...


def free_port() -> int:
    with socket.socket() as one:
        one.bind(("127.0.0.1", 0))
        port: int = one.getsockname()[1]
        return port


class HttpServer:
    """A process that serves HTTP, started in a process group of its own."""

    path = "/v1/chat/completions"
    ready_path = "/v1/models"

    def __init__(
        self, name: str, command: Sequence[str], port: int, log: Path, env: Mapping[str, str]
    ):
        self.name = name
        self.port = port
        self.command = list(command)
        log.parent.mkdir(parents=True, exist_ok=True)
        self._log = log
        with log.open("wb") as out:
            self._process = subprocess.Popen(
                self.command, stdout=out, stderr=subprocess.STDOUT, start_new_session=True,
                env={**os.environ, **env}, cwd=REPOSITORY,
            )  # fmt: skip

    def wait_until_ready(self) -> None:
        """Raises RuntimeError with the log's end when it does not come up."""
        ends = time.monotonic() + START_S
        while time.monotonic() < ends and self._process.poll() is None:
            with suppress(OSError, http.client.HTTPException, ValueError):
                if self.is_ready():
                    return
            time.sleep(0.5)
        self.stop()
        tail = self._log.read_text(errors="replace")[-1500:]
        raise RuntimeError(f"{self.name} did not come up in {START_S:.0f} s:\n{tail}")

    def is_ready(self) -> bool:
        status, _ = self._call("GET", self.ready_path, None)
        return status == 200

    def body(self, ask: Ask) -> dict[str, Any]:
        return {
            "model": "bench",
            "messages": messages(ask),
            "max_tokens": ask.new_tokens,
            "temperature": 0,
            "ignore_eos": True,
        }

    def count(self, answer: dict[str, Any]) -> int:
        return int(answer["usage"]["completion_tokens"])

    def answer(self, ask: Ask) -> int:
        status, answer = self._call("POST", self.path, self.body(ask))
        if status != 200:
            raise RuntimeError(f"{self.name} answered {status}: {str(answer)[:300]}")
        return self.count(answer)

    def pause(self) -> None:
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        os.killpg(self._process.pid, signal.SIGCONT)

    def stop(self) -> None:
        with suppress(ProcessLookupError):
            self.resume()
            os.killpg(self._process.pid, signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self._process.wait(20)
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()

    def _read(self, path: str) -> bytes:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=10)
        try:
            connection.request("GET", path)
            return connection.getresponse().read()
        finally:
            connection.close()

    def _call(self, method: str, path: str, body: dict[str, Any] | None) -> tuple[int, Any]:
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=600)
        try:
            headers = {"Content-Type": "application/json"}
            connection.request(method, path, json.dumps(body) if body else None, headers)
            response = connection.getresponse()
            return response.status, json.loads(response.read())
        finally:
            connection.close()


class Verbatim(HttpServer):
    """This worker, chat alone."""

    path = "/chat"
    ready_path = "/health"

    def __init__(self, model: Path, dtype: str, work: Path, *, deterministic: bool = False):
        port = free_port()
        self._state = tempfile.TemporaryDirectory(prefix="verbatim-bench-")
        profile = work / ("deterministic.toml" if deterministic else "bench.toml")
        profile.write_text(
            f"""
[server]
chat_port = {port}
media_port = {free_port()}
[chat]
models = ["bench"]
default_model = "bench"
max_running = 64
max_waiting = 64
kv_bytes = "2GiB"
deadline_s = 600.0
deterministic = {str(deterministic).lower()}
[media]
models = ["demo-image"]
preload = []
[daemon]
device = "cpu"
[[models]]
id = "bench"
kind = "chat"
path = "{model}"
dtype = "{dtype}"
chat_template = "chatml"
[[models]]
id = "demo-image"
kind = "sdxl"
path = "demo-image"
shipped = true
dtype = "float32"
default_size = "128x128"
"""
        )
        name = "verbatim, deterministic" if deterministic else "verbatim"
        command = [sys.executable, "orchestrator.py", "--profile", str(profile)]
        env = {"VERBATIM_STATE_DIR": self._state.name}
        super().__init__(name, command, port, work / f"{name}.log", env)

    def is_ready(self) -> bool:
        status, answer = self._call("GET", self.ready_path, None)
        if status != 200 or answer.get("status") not in ("healthy", "ok", "ready"):
            return False
        return b'{what="models_compiled"} 1' in self._read("/metrics")

    def body(self, ask: Ask) -> dict[str, Any]:
        return {
            "messages": messages(ask),
            "max_tokens": ask.new_tokens,
            "temperature": 0,
            "seed": 0,
        }

    def count(self, answer: dict[str, Any]) -> int:
        return int(answer["tokens_generated"])

    def pause(self) -> None:
        """Not at all: its supervisor would take the silence for a hang. Idle, it does nothing."""

    def resume(self) -> None:
        pass

    def stop(self) -> None:
        self._process.terminate()  # its children are in groups of their own; it ends them
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(30)
        super().stop()
        self._state.cleanup()


def vllm(python: Path, model: Path, dtype: str, work: Path) -> HttpServer:
    """vLLM's CPU build in its own virtual environment."""
    port = free_port()
    command = [
        str(python), "-m", "vllm.entrypoints.openai.api_server", "--model", str(model),
        "--served-model-name", "bench", "--dtype", dtype, "--max-model-len", "4096",
        "--host", "127.0.0.1", "--port", str(port), "--enable-prefix-caching",
    ]  # fmt: skip
    env = {"VLLM_CPU_KVCACHE_SPACE": "2", "HF_HUB_OFFLINE": "1", "DO_NOT_TRACK": "1"}
    return HttpServer("vllm", command, port, work / "vllm.log", env)


def transformers_serve(
    python: Path, model: Path, dtype: str, work: Path, *, batching: bool
) -> HttpServer:
    """`transformers serve` with or without its continuous batching."""
    port = free_port()
    name = "transformers serve" + (" --continuous-batching" if batching else "")
    command = [
        str(python.parent / "transformers"), "serve", str(model), "--dtype", dtype, "--host",
        "127.0.0.1", "--port", str(port), "--attn-implementation", "sdpa",
    ]  # fmt: skip
    if batching:
        command.append("--continuous-batching")
    env = {"HF_HUB_OFFLINE": "1"}
    server = HttpServer(name, command, port, work / f"{name.replace(' ', '-')}.log", env)

    def body(ask: Ask) -> dict[str, Any]:
        asked = {**HttpServer.body(server, ask), "model": str(model)}
        del asked["ignore_eos"]  # it takes no such field; random weights do not end by themselves
        return asked

    server.body = body  # type: ignore[method-assign]
    return server
