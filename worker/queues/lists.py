"""A queue in terms of Redis commands; how a command reaches the server is a subclass's business.

Moves that depend on what is there are Lua scripts: MULTI cannot decide, and a second element for
one job is as bad as none. In each script the step that can fail comes before the one that removes.
A script's keys lie in several slots, so a Redis cluster cannot hold a queue.
"""

from __future__ import annotations

import base64
import json
import threading
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Iterable
from typing import TypeAlias

from worker.errors import ConfigError
from worker.queues.queue import ALIVE_S, LIST_NAME, WORKER_NAME, QueueUnavailable

Reply: TypeAlias = "bytes | int | list[Reply] | None"

# Registered before the element moves, in the same breath: a processing list that nobody could
# find would be lost. ARGV[3] is how many elements this worker knows that it has.
_TAKE = """
redis.call('SADD', KEYS[3], ARGV[1])
redis.call('SET', KEYS[4], '1', 'EX', ARGV[2])
if redis.call('LLEN', KEYS[2]) > tonumber(ARGV[3]) then
  return redis.call('LRANGE', KEYS[2], 0, -1)
end
return redis.call('LMOVE', KEYS[1], KEYS[2], 'LEFT', 'RIGHT')
"""

_BEAT = """
redis.call('SADD', KEYS[1], ARGV[1])
redis.call('SET', KEYS[2], '1', 'EX', ARGV[2])
return 1
"""

_GIVE_BACK = """
if not redis.call('LPOS', KEYS[2], ARGV[1]) then return 0 end
redis.call('LPUSH', KEYS[1], ARGV[1])
return redis.call('LREM', KEYS[2], 1, ARGV[1])
"""

_BURY = """
if not redis.call('LPOS', KEYS[2], ARGV[2]) then return 0 end
redis.call('RPUSH', KEYS[1], ARGV[1])
return redis.call('LREM', KEYS[2], 1, ARGV[2])
"""

# Names of pods that ended in good order are forgotten on the way, or the set would only grow.
_ORPHANS = """
local orphans = {}
for _, worker in ipairs(redis.call('SMEMBERS', KEYS[1])) do
  if redis.call('EXISTS', ARGV[1] .. ':alive:' .. worker) == 0 then
    if redis.call('LLEN', ARGV[1] .. ':processing:' .. worker) > 0 then
      table.insert(orphans, worker)
    else
      redis.call('SREM', KEYS[1], worker)
    end
  end
end
return orphans
"""

_ADOPT = """
if redis.call('EXISTS', KEYS[4]) == 1 then return 0 end
local moved = 0
while redis.call('LMOVE', KEYS[2], KEYS[1], 'RIGHT', 'LEFT') do moved = moved + 1 end
redis.call('SREM', KEYS[3], ARGV[1])
if moved > 0 then redis.call('SADD', KEYS[5], ARGV[1]) end
return moved
"""


class ListQueue(ABC):
    """A JobQueue on the lists of a Redis server, whatever the way to it.

    Any thread; the moves of elements come one after the other, under a lock.
    """

    def __init__(self, name: str, worker: str):
        """Raises ConfigError for a name that cannot be part of a key."""
        if not LIST_NAME.fullmatch(name):
            raise ConfigError(f"a list of jobs needs a name that matches {LIST_NAME.pattern}")
        self._name = name
        self._worker = checked_worker(worker)
        self._processing, self._alive = self._keys_of(worker)
        self._workers = f"{name}:workers"
        self._dead = f"{name}:dead"
        self._adopted = f"{name}:adopted"
        self._lock = threading.Lock()
        # What was handed out and is not settled. An element in the processing list beyond these
        # was moved by a `take` whose answer never came.
        self._out: Counter[bytes] = Counter()

    @abstractmethod
    def _run(self, *command: str | bytes | int) -> Reply:
        """Have the server do one command, at most once. Raises QueueUnavailable."""

    @abstractmethod
    def close(self) -> None:
        """Close the connections."""

    @property
    def name(self) -> str:
        return self._name

    # --- elements ------------------------------------------------------------------------------

    def take(self) -> bytes | None:
        with self._lock:
            keys = self._name, self._processing, self._workers, self._alive
            known = self._out.total()
            reply = self._run("EVAL", _TAKE, len(keys), *keys, self._worker, ALIVE_S, known)
            if isinstance(reply, list):
                reply = self._first_unknown(_elements(reply))
            if reply is None:
                return None
            if not isinstance(reply, bytes):
                raise _strange()
            self._out[reply] += 1
            return reply

    def held(self) -> list[bytes]:
        with self._lock:
            self.beat()  # from here on nobody adopts what is about to be read
            elements = _elements(self._run("LRANGE", self._processing, 0, -1))
            self._out = Counter(elements)
            return elements

    def settle(self, element: bytes) -> None:
        with self._lock:
            self._run("LREM", self._processing, 1, element)
            self._forget(element)

    def give_back(self, element: bytes) -> None:
        with self._lock:
            self._run("EVAL", _GIVE_BACK, 2, self._name, self._processing, element)
            self._forget(element)

    def bury(self, element: bytes, reason: str, worker: str, at: str) -> None:
        record = dead_letter(element, reason, worker, at)
        with self._lock:
            self._bury(element, record)
            self._forget(element)

    def _bury(self, element: bytes, record: str) -> None:
        self._run("EVAL", _BURY, 2, self._dead, self._processing, record, element)

    def _first_unknown(self, elements: Iterable[bytes]) -> bytes | None:
        known = Counter(self._out)
        for element in elements:
            if not known[element]:
                return element
            known[element] -= 1
        return None

    def _forget(self, element: bytes) -> None:
        self._out -= Counter([element])

    # --- workers -------------------------------------------------------------------------------

    def waiting(self) -> int:
        return _number(self._run("LLEN", self._name))

    def beat(self) -> None:
        self._run("EVAL", _BEAT, 2, self._workers, self._alive, self._worker, ALIVE_S)

    def orphans(self) -> list[str]:
        reply = self._run("EVAL", _ORPHANS, 1, self._workers, self._name)
        names = (name.decode("utf-8", "replace") for name in _elements(reply))
        return sorted(
            name for name in names if WORKER_NAME.fullmatch(name) and name != self._worker
        )

    def adopt(self, worker: str) -> int:
        checked_worker(worker)
        if worker == self._worker:
            raise ValueError("a worker cannot adopt its own elements; held() has them")
        processing, alive = self._keys_of(worker)
        keys = self._name, processing, self._workers, alive, self._adopted
        return _number(self._run("EVAL", _ADOPT, len(keys), *keys, worker))

    def was_adopted(self) -> bool:
        return _number(self._run("SISMEMBER", self._adopted, self._worker)) == 1

    def note_adoption(self) -> None:
        self._run("SREM", self._adopted, self._worker)

    def _keys_of(self, worker: str) -> tuple[str, str]:
        return f"{self._name}:processing:{worker}", f"{self._name}:alive:{worker}"


def checked_worker(worker: str) -> str:
    """`worker`, where it can be part of a key. Raises ConfigError."""
    if not WORKER_NAME.fullmatch(worker):
        raise ConfigError(f"a worker needs a name that matches {WORKER_NAME.pattern}")
    return worker


def dead_letter(element: bytes, reason: str, worker: str, at: str) -> str:
    """The JSON that is kept of an element that no worker can run."""
    record = {"reason": reason, "worker": worker, "at": at}
    try:
        record["element"] = element.decode("utf-8")
    except UnicodeDecodeError:
        record["element_base64"] = base64.b64encode(element).decode("ascii")
    return json.dumps(record)


def _elements(reply: Reply) -> list[bytes]:
    if not isinstance(reply, list):
        raise _strange()
    elements = [one for one in reply if isinstance(one, bytes)]
    if len(elements) != len(reply):
        raise _strange()
    return elements


def _number(reply: Reply) -> int:
    if not isinstance(reply, int):
        raise _strange()
    return reply


def _strange() -> QueueUnavailable:
    return QueueUnavailable("the queue's server gave an answer that Redis does not give")
