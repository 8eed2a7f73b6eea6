"""The queues that the environment names, and this worker's name on them."""

from __future__ import annotations

import os
import re
import secrets
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from worker.errors import ConfigError
from worker.queues.queue import WORKER_NAME, JobQueue
from worker.queues.redis_queue import RedisQueue
from worker.queues.upstash_queue import UpstashQueue

REDIS_URL = "REDIS_URL"
REST_URL = "UPSTASH_REDIS_REST_URL"
REST_TOKEN = "UPSTASH_REDIS_REST_TOKEN"
CHOICE = "VERBATIM_QUEUE"
POD_ID = "RUNPOD_POD_ID"

NAME_FILE = "worker-name"

_NEEDED = {"redis": (REDIS_URL,), "upstash": (REST_URL, REST_TOKEN)}


def queues_from_environment(
    env: Mapping[str, str], lists: Sequence[str], worker: str
) -> list[JobQueue]:
    """A queue for each of `lists`, on the server that `env` names; none where it names no server.

    Nothing is opened yet. Raises ConfigError for half a setting, for two servers without a choice
    between them, and for an address or name that cannot be used.
    """
    given = {name: value.strip() for name, value in env.items() if value.strip()}
    choice = _choice(given)
    if choice is None:
        return []
    if missing := [name for name in _NEEDED[choice] if name not in given]:
        raise ConfigError(f"a queue over {choice} needs {' and '.join(missing)} to be set")
    if len(set(lists)) != len(lists):
        raise ConfigError("a list of jobs is named twice")
    if choice == "redis":
        return [RedisQueue(given[REDIS_URL], name, worker) for name in lists]
    return [UpstashQueue(given[REST_URL], given[REST_TOKEN], name, worker) for name in lists]


def worker_name(env: Mapping[str, str], state_dir: Path) -> str:
    """The name that is kept in the file `worker-name` of `state_dir`: it belongs to the journal
    there, so that whoever goes on with that finds what the earlier life held, on another pod too.
    A new one has the pod's id in it, where there is one, and chance.

    Raises ConfigError where the file cannot be written or does not hold a name.
    """
    pod_id = env.get(POD_ID, "").strip()
    begin = pod_id if re.fullmatch(r"[A-Za-z0-9._-]{1,40}", pod_id) else "worker"
    path = state_dir / NAME_FILE
    try:
        state_dir.mkdir(parents=True, exist_ok=True)
        if not path.exists():
            _create(path, f"{begin}-{secrets.token_hex(8)}")
        name = path.read_bytes().decode("utf-8", "replace").strip()
    except OSError as exc:
        raise ConfigError(f"the worker's name cannot be kept in {path}: {exc.strerror}") from exc
    if not WORKER_NAME.fullmatch(name):
        raise ConfigError(f"{path} does not hold a worker's name; remove it for a new one")
    return name


def _choice(given: Mapping[str, str]) -> str | None:
    """redis, upstash, or None: no setting of either is there."""
    asked = given.get(CHOICE)
    if asked is not None:
        if asked not in _NEEDED:
            raise ConfigError(f"{CHOICE} must be {' or '.join(_NEEDED)}")
        return asked
    begun = [kind for kind, names in _NEEDED.items() if any(name in given for name in names)]
    if len(begun) > 1:
        raise ConfigError(
            f"{REDIS_URL} and {REST_URL} name two servers; set {CHOICE} to {' or '.join(_NEEDED)}"
        )
    return begun[0] if begun else None


def _create(path: Path, text: str) -> None:
    """Have `path` hold a text, whole from its first moment; one that is there meanwhile stays."""
    handle, draft = tempfile.mkstemp(prefix=f".{path.name}-", dir=path.parent)
    try:
        with os.fdopen(handle, "w", encoding="utf-8") as file:
            file.write(text + "\n")
            file.flush()
            os.fsync(file.fileno())
        try:
            os.link(draft, path)
        except FileExistsError:
            return  # another process was quicker, and both use its name
    finally:
        os.unlink(draft)
