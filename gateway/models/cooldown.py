"""Models that failed too often are left alone for a while, so that callers do not wait for them.

Three failures within 30 s: 30 s of rest. After a rest a model is on trial: its next failure,
without a success between, gives it a rest twice as long, up to 8 minutes. A success clears all.
Time is monotonic seconds, given by the caller.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from threading import Lock

FAILURES = 3
WINDOW_S = 30.0
REST_S = 30.0
LONGEST_REST_S = 480.0
FORGOTTEN_S = 900.0  # after a rest ended: what happened before then says nothing any more


@dataclass(frozen=True, slots=True)
class Record:
    """What is remembered of a model."""

    failures: tuple[float, ...] = ()  # times, at most FAILURES, oldest first
    until: float | None = None  # end of the last rest
    rest_s: float = 0.0  # its length
    why: str = ""  # of the last failure

    def is_resting(self, now: float) -> bool:
        return self.until is not None and now < self.until


def after_failure(record: Record, now: float, why: str) -> Record:
    """The record with a failure at `now`. Failures during a rest are of the same outage."""
    if record.is_resting(now):
        return record
    if record.until is not None and now - record.until > FORGOTTEN_S:
        record = Record()
    recent = tuple(at for at in record.failures if now - at <= WINDOW_S)
    failures = (*recent, now)[-FAILURES:]
    on_trial = record.until is not None
    if not on_trial and len(failures) < FAILURES:
        return replace(record, failures=failures, why=why)
    rest_s = min(LONGEST_REST_S, record.rest_s * 2 or REST_S)
    return Record(failures=(), until=now + rest_s, rest_s=rest_s, why=why)


class Cooldowns:
    """Records by model key. Owner: its lock; any thread. Of this process only: each replica finds
    out for itself."""

    def __init__(self) -> None:
        self._lock = Lock()
        self._records: dict[str, Record] = {}

    def failed(self, model_key: str, now: float, why: str) -> None:
        """why: shown to callers; without text of prompts or secrets."""
        with self._lock:
            self._records = {
                key: record
                for key, record in self._records.items()
                if now - (record.until or max(record.failures, default=now)) <= FORGOTTEN_S
            }
            known = self._records.get(model_key, Record())
            self._records[model_key] = after_failure(known, now, why)

    def succeeded(self, model_key: str) -> None:
        with self._lock:
            self._records.pop(model_key, None)

    def unavailable(self, now: float) -> Mapping[str, str]:
        """Keys of models that rest, with a sentence each."""
        with self._lock:
            return {
                key: f"rests for {record.until - now:.1f} s more after failures; "
                f"the last: {record.why}"
                for key, record in self._records.items()
                if record.until is not None and record.is_resting(now)
            }
