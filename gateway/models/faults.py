"""How a model provider fails, so that a caller, a log and a cooldown can each tell why.

Nothing that a provider wrote is in a message: it may hold the prompt, a key, or a word that a
client misreads.
"""

from __future__ import annotations

from typing import Any

from gateway.errors import ProviderFault, has_trap_word

UNREACHABLE = "unreachable"  # no connection, a certificate that is wrong, broke off
TIMEOUT = "timeout"
ADDRESS = "address"  # the base URL may not be used
NO_SECRET = "no_secret"
UNAUTHORIZED = "unauthorized"  # 401, 403
UNKNOWN_MODEL = "unknown_model"  # 404
BUSY = "busy"  # 429
REJECTED = "rejected"  # any other 4xx: this request, not the model
SERVER_ERROR = "server_error"  # 5xx, or an error in an answer that says 200
BROKEN = "broken"  # not HTTP, not JSON, or not the answer of this interface
TOO_LARGE = "too_large"
REDIRECT = "redirect"  # 3xx: a key does not follow one

# These say nothing about whether the model works, so they do not make it cool down.
_NOT_THE_MODEL = frozenset({NO_SECRET, ADDRESS, REJECTED})


class ProviderError(ProviderFault):
    """One exchange with a provider failed."""

    def __init__(
        self,
        reason: str,
        message: str,
        *,
        provider_status: int | None = None,
        retry_after_s: float | None = None,
    ):
        """reason: one of this module's. provider_status: the HTTP status, where one came."""
        fields: dict[str, Any] = {"reason": reason}
        if provider_status is not None:
            fields["provider_status"] = provider_status
        super().__init__(message, retry_after_s=retry_after_s, fields=fields)
        self.reason = reason
        self.provider_status = provider_status

    @property
    def counts(self) -> bool:
        """Whether it is a failure of the model, for cooldowns."""
        return self.reason not in _NOT_THE_MODEL


def shown(name: str) -> str:
    """A name that others chose, as an error may carry it: cut, one line, without a trap word."""
    if not name.isprintable() or has_trap_word(name):
        return "(name withheld)"
    return name[:120]
