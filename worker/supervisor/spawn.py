"""Starting children: their command lines and environments."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Mapping

from worker.config import KEY_NAMES, REPOSITORY, Settings
from worker.lifeline import PARENT_VARIABLE
from worker.supervisor.child import ChildSpec
from worker.supervisor.logs import ChildLogs

# Engines run models on files; no secret of the pod is any of their business.
_NOT_FOR_ENGINES = (
    *KEY_NAMES,
    "SUPABASE_SERVICE_KEY",
    "SUPABASE_SERVICE_ROLE_KEY",
    "UPSTASH_REDIS_REST_TOKEN",
    "REDIS_URL",  # has a password in it
    "S3_SECRET_ACCESS_KEY",
    "JOB_CALLBACK_SECRET",
    "HF_TOKEN",
)
# A library that misses a file must fail, not fetch it.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1"}
# Two engines share the CPU. By default OpenMP's threads spin for their next piece of work, and two
# processes that spin on the same cores starve each other: a 0.3 s picture of the demo model took 3
# to 34 s beside a second one on 2 cores. With this it takes 0.5 s alone and 0.8 s beside another
# (docs/decisions/0005).
_PATIENT = {"GOMP_SPINCOUNT": "3000"}


def child_specs(settings: Settings) -> list[ChildSpec]:
    """The processes of a profile."""
    profile = ("--profile", str(settings.profile_path))
    server = settings.server
    guests = []
    if settings.gateway is not None:
        arguments = ("-m", "gateway", "serve", *profile)
        guests.append(ChildSpec("gateway", arguments, settings.gateway.port, is_guest=True))
    return [
        # First, so that the ports answer before the engines' imports take the CPU.
        ChildSpec("front chat", ("-m", "worker.front", "chat", *profile), server.chat_port),
        ChildSpec("front media", ("-m", "worker.front", "media", *profile), server.media_port),
        ChildSpec("runner", ("-m", "worker.jobs", *profile)),
        ChildSpec("engine chat", ("-m", "worker.engine", "chat", *profile)),
        ChildSpec("engine media", ("-m", "worker.engine", "media", *profile)),
        *guests,
    ]


def guest_environment(settings: Settings) -> dict[str, str]:
    """Where the gateway finds this worker, unless its profile names workers itself."""
    if settings.gateway is None:
        return {}
    host = f"[{settings.server.host}]" if ":" in settings.server.host else settings.server.host
    host = "127.0.0.1" if host in ("0.0.0.0", "[::]") else host
    named = settings.gateway.model_extra or {}
    places = {
        "chat_workers": settings.server.chat_port,
        "media_workers": settings.server.media_port,
    }
    return {
        f"GATEWAY_{key.upper()}": f"http://{host}:{port}"
        for key, port in places.items()
        if not named.get(key)
    }


class Spawner:
    """Starts processes whose output goes to their logs."""

    def __init__(self, logs: ChildLogs, environment: Mapping[str, str]):
        self._logs = logs
        self._environment = dict(environment)

    def __call__(self, spec: ChildSpec) -> subprocess.Popen[bytes]:
        """Must be called on the main thread: the kernel ends a child with the thread that made it
        (worker/lifeline.py)."""
        output = self._logs.open(spec.name)
        try:
            return subprocess.Popen(
                [sys.executable, *spec.arguments],
                cwd=REPOSITORY,
                env=child_environment(self._environment, is_engine=spec.is_engine),
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=subprocess.STDOUT,
                # Ctrl-C in the terminal is for the orchestrator alone; it ends them in order.
                start_new_session=True,
            )
        finally:
            os.close(output)


def child_environment(environment: Mapping[str, str], *, is_engine: bool) -> dict[str, str]:
    """What a child gets of our environment."""
    kept = {
        name: value
        for name, value in environment.items()
        if not (is_engine and name in _NOT_FOR_ENGINES)
    }
    return (_PATIENT | kept) | {
        PARENT_VARIABLE: str(os.getpid()),
        "PYTHONPATH": str(REPOSITORY),
        "PYTHONUNBUFFERED": "1",
        **_OFFLINE,
    }
